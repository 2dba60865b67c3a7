//! Link rings: whole messages in order, wrap-around, liars on both sides, and two real threads.
#![cfg(not(loom))]

mod common;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use common::shared;
use proptest::prelude::*;
use vbus_ring::area::LayoutError;
use vbus_ring::link::{LinkError, LinkLayout, LinkReceiver, LinkSender, HEADER};
use vbus_ring::mem::Window;

const SIZE: usize = 256;
const TAIL: usize = 0;
const HEAD: usize = 64;

fn ring() -> (Window, LinkSender, LinkReceiver) {
    let area = shared(HEADER + SIZE);
    let layout = LinkLayout::new(area.size(), 0, SIZE).unwrap();
    (area, LinkSender::new(layout), LinkReceiver::new(layout))
}

fn message(length: usize, fill: u8) -> Vec<u8> {
    let mut message = vec![fill; length];
    message[6..8].copy_from_slice(&(length as u16).to_le_bytes());
    message
}

#[test]
fn messages_come_out_whole_and_in_order() {
    let (area, mut sender, mut receiver) = ring();
    assert_eq!(receiver.receive(&area), Ok(None));
    for round in 0..100u8 {
        for length in [8, 9, 15, 16, 100] {
            assert_eq!(sender.send(&area, &message(length, round)), Ok(true));
        }
        for length in [8, 9, 15, 16, 100] {
            assert_eq!(receiver.receive(&area), Ok(Some(message(length, round))));
        }
        assert_eq!(receiver.receive(&area), Ok(None));
    }
}

#[test]
fn a_full_ring_takes_no_more_until_something_was_taken_out() {
    let (area, mut sender, mut receiver) = ring();
    for _ in 0..2 {
        assert_eq!(sender.send(&area, &message(128, 1)), Ok(true));
    }
    assert_eq!(sender.send(&area, &message(8, 2)), Ok(false));
    assert_eq!(receiver.receive(&area), Ok(Some(message(128, 1))));
    assert_eq!(sender.send(&area, &message(121, 2)), Ok(true));
    assert_eq!(sender.send(&area, &message(8, 3)), Ok(false), "messages take multiples of 8 bytes");
}

#[test]
fn a_callers_mistakes_are_refused_before_anything_is_written() {
    let (area, mut sender, mut receiver) = ring();
    for wrong in [vec![], vec![0; 7], message(129, 0), vec![0; 8], [message(16, 0), vec![0]].concat()] {
        let error = sender.send(&area, &wrong).unwrap_err();
        assert!(matches!(error, LinkError::Caller(_)), "{error}");
        assert_eq!(error.violation(), None);
    }
    assert_eq!(receiver.receive(&area), Ok(None));
}

#[test]
fn a_head_that_cannot_be_is_a_violation() {
    for head in [8, 1, u32::MAX, 0x8000_0000, (SIZE as u32 + 8).wrapping_neg()] {
        let (area, mut sender, _) = ring();
        area.store32(HEAD, head, Ordering::Relaxed);
        let error = sender.send(&area, &message(8, 0)).unwrap_err();
        assert_eq!(error.violation().unwrap().name(), "link-index", "{head:#x}");
    }
}

#[test]
fn a_tail_that_cannot_be_is_a_violation() {
    for tail in [SIZE as u32 + 8, 4, u32::MAX, 8u32.wrapping_neg()] {
        let (area, _, mut receiver) = ring();
        area.store32(TAIL, tail, Ordering::Relaxed);
        let error = receiver.receive(&area).unwrap_err();
        assert_eq!(error.violation().unwrap().name(), "link-index", "{tail:#x}");
    }
}

#[test]
fn a_length_that_cannot_be_is_a_violation_and_moves_nothing() {
    for (length, put_in) in [(0u16, 8), (7, 8), (9, 8), (17, 16), (u16::MAX, 256), (129, 256)] {
        let (area, _, mut receiver) = ring();
        area.store64(HEADER, u64::from(length) << 48, Ordering::Relaxed);
        area.store32(TAIL, put_in, Ordering::Release);
        let error = receiver.receive(&area).unwrap_err();
        assert_eq!(error.violation().unwrap().name(), "link-message-size", "{length} of {put_in}");
        assert_eq!(area.load32(HEAD, Ordering::Relaxed), 0);
    }
}

#[test]
fn a_side_never_reads_its_own_counter_back() {
    let (area, mut sender, mut receiver) = ring();
    sender.send(&area, &message(8, 1)).unwrap();
    area.store32(TAIL, 4096, Ordering::Relaxed);
    sender.send(&area, &message(8, 2)).unwrap();
    assert_eq!(area.load32(TAIL, Ordering::Relaxed), 16);
    receiver.receive(&area).unwrap();
    area.store32(HEAD, 4096, Ordering::Relaxed);
    assert_eq!(receiver.receive(&area), Ok(Some(message(8, 2))));
}

#[test]
fn wrong_layouts_are_refused() {
    let refused = |area, offset, size| LinkLayout::new(area, offset, size).unwrap_err();
    assert!(matches!(refused(4096, 0, 0), LayoutError::Count(_)));
    assert!(matches!(refused(4096, 0, 8), LayoutError::Count(_)));
    assert!(matches!(refused(4096, 0, 300), LayoutError::Count(_)));
    assert!(matches!(refused(4096, 4, 256), LayoutError::Misaligned { .. }));
    assert!(matches!(refused(4096, 4096 - 256, 256), LayoutError::Outside { .. }));
    assert!(matches!(refused(4096, usize::MAX - 7, 256), LayoutError::Outside { .. }));
}

#[test]
fn two_threads_exchange_messages_of_all_sizes() {
    let (area, mut sender, mut receiver) = ring();
    let length = |number: u32| 12 + (number * 7 % 100) as usize;
    let contents = |number: u32| {
        let mut message = message(length(number), number as u8);
        message[8..12].copy_from_slice(&number.to_le_bytes());
        message
    };
    const MESSAGES: u32 = 50_000;
    std::thread::scope(|scope| {
        let area = &area;
        scope.spawn(move || {
            for number in 0..MESSAGES {
                while !sender.send(area, &contents(number)).unwrap() {
                    std::thread::yield_now();
                }
            }
        });
        for number in 0..MESSAGES {
            let received = loop {
                match receiver.receive(area).unwrap() {
                    Some(received) => break received,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!(received, contents(number));
        }
    });
}

proptest! {
    #[test]
    fn a_ring_is_a_queue(
        steps in prop::collection::vec(prop::option::weighted(0.6, (8usize..=128, any::<u8>())), 0..300)
    ) {
        let (area, mut sender, mut receiver) = ring();
        let mut queue = VecDeque::new();
        for step in steps {
            match step {
                Some((length, fill)) => {
                    let used: usize = queue.iter().map(|message: &Vec<u8>| message.len().next_multiple_of(8)).sum();
                    let fits = used + length.next_multiple_of(8) <= SIZE;
                    prop_assert_eq!(sender.send(&area, &message(length, fill)), Ok(fits));
                    if fits {
                        queue.push_back(message(length, fill));
                    }
                }
                None => prop_assert_eq!(receiver.receive(&area), Ok(queue.pop_front())),
            }
        }
    }

    #[test]
    fn any_ring_contents_are_survived(
        tails in prop::collection::vec(0u32..40, 1..20),
        words in prop::collection::vec((0..SIZE / 8, 0u64..200, any::<u64>()), 0..64),
    ) {
        let (area, _, mut receiver) = ring();
        for (word, length, rest) in words {
            area.store64(HEADER + word * 8, length << 48 | rest >> 16, Ordering::Relaxed);
        }
        for tail in tails {
            area.store32(TAIL, tail * 8, Ordering::Release);
            while let Ok(Some(message)) = receiver.receive(&area) {
                prop_assert!((8..=SIZE / 2).contains(&message.len()));
                prop_assert_eq!(usize::from(u16::from_le_bytes([message[6], message[7]])), message.len());
            }
        }
    }
}
