//! Link rings under loom: one thread sends, one receives, and every message comes out whole and in order, also where the
//! ring's end is passed and where bytes are used again.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p vbus-ring --test loom_link`.
#![cfg(loom)]

use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;
use vbus_ring::area::Area;
use vbus_ring::link::{LinkLayout, LinkReceiver, LinkSender, HEADER};

const SIZE: usize = 32;

#[derive(Clone)]
struct ModelArea {
    tail: Arc<AtomicU32>,
    head: Arc<AtomicU32>,
    data: Arc<[AtomicU64; SIZE / 8]>,
}

impl ModelArea {
    fn new() -> Self {
        Self {
            tail: Arc::new(AtomicU32::new(0)),
            head: Arc::new(AtomicU32::new(0)),
            data: Arc::new(std::array::from_fn(|_| AtomicU64::new(0))),
        }
    }

    fn counter(&self, offset: usize) -> &AtomicU32 {
        match offset {
            0 => &self.tail,
            64 => &self.head,
            _ => panic!("no counter at {offset}"),
        }
    }
}

impl Area for ModelArea {
    fn size(&self) -> usize {
        HEADER + SIZE
    }
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.counter(offset).load(order)
    }
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.counter(offset).store(value, order);
    }
    fn load64(&self, offset: usize, order: Ordering) -> u64 {
        self.data[(offset - HEADER) / 8].load(order)
    }
    fn store64(&self, offset: usize, value: u64, order: Ordering) {
        self.data[(offset - HEADER) / 8].store(value, order);
    }
}

fn message(number: usize) -> Vec<u8> {
    let length = [16, 8, 13, 16][number % 4];
    let mut message = vec![number as u8 + 1; length];
    message[6..8].copy_from_slice(&(length as u16).to_le_bytes());
    message
}

#[test]
fn messages_are_whole_and_in_order() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(|| {
        let area = ModelArea::new();
        let layout = LinkLayout::new(area.size(), 0, SIZE).unwrap();
        let theirs = area.clone();
        let sending = thread::spawn(move || {
            let mut sender = LinkSender::new(layout);
            // A full ring ends it: loom explores those in which the receiver was faster, too.
            (0..4).take_while(|number| sender.send(&theirs, &message(*number)).unwrap()).count()
        });
        let mut receiver = LinkReceiver::new(layout);
        let mut received = Vec::new();
        for _ in 0..3 {
            received.extend(receiver.receive(&area).unwrap());
        }
        let sent = sending.join().unwrap();
        while let Some(message) = receiver.receive(&area).unwrap() {
            received.push(message);
        }
        let expected: Vec<_> = (0..sent).map(message).collect();
        assert_eq!(received, expected);
    });
}
