//! What a frame costs a loopback's worker, without a driver on another CPU: frames of 64 bytes go round, 32 at a time.
//!
//! For whoever counts instructions, which do not drift: `valgrind --tool=callgrind --toggle-collect='loopback_steps::turn*'`
//! counts those of the engine alone. Run by itself it says nanoseconds a frame, of the engine's turns alone.
//!
//! Arguments: `split` or `packed`, and how many frames.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Arena, Silent};
use vbus_engine::loopback::Loopback;
use vbus_engine::net::{Filter, Rules, HEADER};
use vbus_engine::queue::Queue;
use vbus_engine::worker::Engine;

/// Frames that are sent together, descriptors of a ring, and bytes of a frame.
const BURST: usize = 32;
const SIZE: u32 = 256;
const FRAME: usize = 64;
/// Where a buffer begins in its own 2 KiB: so that its header ends a line, as DPDK has it.
const FRONT: u64 = 128 - HEADER as u64;
const ROOM: usize = 2048;

/// By itself, so that it can be told from what the driver does.
#[inline(never)]
fn turn(engine: &Loopback) -> bool {
    engine.turn(false).worked
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let packed = words.get(1).is_some_and(|word| word == "packed");
    let frames: usize = words.get(2).and_then(|word| word.parse().ok()).unwrap_or(32_000);
    let mut arena = Arena::new();
    let (receive, transmit) = (Arc::new(Queue::default()), Arc::new(Queue::default()));
    let (mut rx, _rx_bell) = arena.in_order_ring(SIZE, packed, &receive);
    let (mut tx, _tx_bell) = arena.in_order_ring(SIZE, packed, &transmit);
    let engine = Loopback::new(receive, transmit, Arc::new(Silent));
    let filter = Filter { promiscuous: true, ..Filter::default() };
    engine.set_rules(Rules { link: true, in_use: true, merge: true, filter, ..Rules::default() });
    let buffers: Vec<u64> = (0..2 * BURST).map(|_| arena.take(ROOM)).collect();
    let (mut sent, mut room): (Vec<u64>, Vec<u64>) = (buffers[..BURST].to_vec(), buffers[BURST..].to_vec());
    let (mut back, mut taken) = (Vec::new(), Duration::ZERO);
    let mut done = 0;
    while done < frames {
        for &buffer in &room {
            rx.add(&[], &[(buffer + FRONT, 1536)]).unwrap().unwrap();
        }
        for &buffer in &sent {
            tx.add(&[(buffer + FRONT, (HEADER + FRAME) as u64)], &[]).unwrap().unwrap();
        }
        let _ = (rx.publish(), tx.publish());
        let began = Instant::now();
        while turn(&engine) {}
        taken += began.elapsed();
        back.clear();
        rx.poll(BURST, &mut back).unwrap();
        assert!(back.iter().all(|&(_, written)| written as usize == HEADER + FRAME) && back.len() == BURST);
        back.clear();
        tx.poll(BURST, &mut back).unwrap();
        assert!(back.len() == BURST);
        std::mem::swap(&mut sent, &mut room);
        done += BURST;
    }
    println!("{:.1} ns a frame", taken.as_nanos() as f64 / done as f64);
}
