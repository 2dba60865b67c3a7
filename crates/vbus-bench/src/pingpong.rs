//! Round trips between two sides of a shared area, one at a time: through nothing but what carries them, through rings
//! without checks, and through rings.
//!
//! A round trip takes a value to the other side, which adds it up, and brings nothing back but that it was taken. Both
//! sides sum up what they saw, so that two ways of doing the same can be held to have done it.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use vbus_ring::area::LayoutError;
use vbus_ring::mem::{Mapping, Memory, Window};
use vbus_ring::ring::{AddError, Chain, DeviceRing, DriverRing, Features, Setup};
use vbus_ring::violation::Violation;

use crate::bare;
use crate::wait::{hear, say, Patience, Silence};

/// Where the area begins in the driver's address space.
const ADDRESS: u64 = 1 << 32;
/// Descriptors of every ring.
pub const SIZE: u16 = 256;
/// Offsets of the two lines of the bare exchange, of the line of data, and of the ring: none shares a line with another,
/// nor the next one, which processors may fetch with it.
const LINES: [usize; 2] = [0, 256];
const DATA: usize = 4096;
const RING: usize = 8192;
/// Bytes of data, and of a line.
const LINE: u64 = 64;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum PingError {
    /// The other side broke the ring.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// It does not answer.
    #[error(transparent)]
    Silence(#[from] Silence),
    /// An eventfd broke.
    #[error(transparent)]
    System(#[from] io::Error),
    /// The area has no room for the ring.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The ring does not take a request.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The ring is full with nothing in it.
    #[error("the ring has no room for one request")]
    NoRoom,
}

/// How values travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Two eventfds, which carry the values.
    Eventfds,
    /// A cache line in each direction.
    Lines,
    /// A ring of the split layout that checks nothing and asks for nothing.
    BareSplit,
    /// One of the packed layout.
    BarePacked,
    /// A ring.
    Ring {
        /// Of the packed layout.
        packed: bool,
        /// Each side sleeps on an eventfd while there is nothing; else it polls.
        notified: bool,
    },
}

/// What both sides share.
pub struct Shared {
    area: Arc<Mapping>,
    /// Of blocking eventfds: towards the device, and towards the driver.
    bells: [RawFd; 2],
}

impl Shared {
    /// An area of at least `bytes_needed`, zero at first, and two eventfds.
    pub fn new(area: Arc<Mapping>, bells: [RawFd; 2]) -> Result<Self, LayoutError> {
        if area.size() < Self::bytes_needed() || !area.writable() {
            return Err(LayoutError::Count("a writable area of the bytes that are needed"));
        }
        Ok(Self { area, bells })
    }

    /// Bytes of the area.
    pub fn bytes_needed() -> usize {
        let sizes = [false, true].map(|packed| DriverRing::bytes_needed(u32::from(SIZE), packed).unwrap_or(0));
        (RING + sizes[0].max(sizes[1])).next_multiple_of(4096)
    }

    fn features(packed: bool) -> Features {
        Features { packed, event_idx: true, ..Features::default() }
    }
}

/// The value of a round trip, from 0 on.
fn value(number: u64) -> u64 {
    number % 251 + 1
}

/// What a side did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rounds {
    /// Round trips.
    pub count: u64,
    /// Of all values.
    pub sum: u64,
    /// Nanoseconds of a round trip, each of a block of them, ascending. On the side that begins.
    pub times: Vec<u64>,
    /// From the first to the last.
    pub nanoseconds: u64,
}

/// The two ends of every way.
enum End<R, S, P> {
    Eventfds,
    Lines { words: bare::Words, number: u64 },
    Split(S),
    Packed(P),
    Ring { ring: R, notified: bool },
}

/// The side that begins: a driver.
pub struct Ping {
    shared: Shared,
    end: End<DriverRing, bare::SplitDriver, bare::PackedDriver>,
}

/// The side that answers: a device. Made after the driver's, which clears the ring.
pub struct Echo {
    shared: Shared,
    end: End<DeviceRing, bare::SplitDevice, bare::PackedDevice>,
}

impl Ping {
    /// Begin nothing yet.
    pub fn new(shared: Shared, way: Way) -> Result<Self, PingError> {
        let words = bare::Words::new(shared.area.clone());
        let end = match way {
            Way::Eventfds => End::Eventfds,
            Way::Lines => End::Lines { words, number: 0 },
            Way::BareSplit => End::Split(bare::SplitDriver::new(words, RING, DATA, SIZE)),
            Way::BarePacked => End::Packed(bare::PackedDriver::new(words, RING, DATA, SIZE)),
            Way::Ring { packed, notified } => {
                let features = Shared::features(packed);
                let ring = DriverRing::new(&shared.area, RING, ADDRESS, u32::from(SIZE), features)?;
                End::Ring { ring, notified }
            }
        };
        Ok(Self { shared, end })
    }

    /// Driver addresses of the ring's parts, for the other side; zeroes where there is no ring.
    pub fn places(&self) -> [u64; 3] {
        match &self.end {
            End::Ring { ring, .. } => [ring.desc(), ring.driver(), ring.device()],
            _ => [0; 3],
        }
    }

    /// `count` round trips, timed in blocks of `block`.
    pub fn run(&mut self, count: u64, block: u64) -> Result<Rounds, PingError> {
        let Self { shared, end } = self;
        let [kick, call] = shared.bells;
        match end {
            End::Ring { ring, notified } => {
                let notified = *notified;
                let data = Window::new(shared.area.clone(), DATA, LINE as usize);
                let mut finished = Vec::with_capacity(1);
                timed(count, block, |value| {
                    data.store64(0, value, Ordering::Relaxed);
                    ring.add(&[(ADDRESS + DATA as u64, LINE)], &[])?.ok_or(PingError::NoRoom)?;
                    if ring.publish() && notified {
                        say(&kick)?;
                    }
                    finished.clear();
                    let mut patience = Patience::default();
                    loop {
                        if notified {
                            ring.reap(1, &mut finished)?;
                        } else {
                            ring.poll(1, &mut finished)?;
                        }
                        match (finished.is_empty(), notified) {
                            (false, _) => return Ok(()),
                            (true, true) => drop(hear(&call)?),
                            (true, false) => patience.glance()?,
                        }
                    }
                })
            }
            End::Eventfds => timed(count, block, |value| {
                bare::say_value(kick, value)?;
                hear(&call)?;
                Ok(())
            }),
            End::Split(ring) => timed(count, block, |value| Ok(ring.round(value)?)),
            End::Packed(ring) => timed(count, block, |value| Ok(ring.round(value)?)),
            End::Lines { words, number } => timed(count, block, |value| {
                *number += 1;
                // The number in the upper half, so that two values alike are two messages.
                words.store64(LINES[0], *number << 32 | value, Ordering::Release);
                Ok(words.wait64(LINES[1], |word| word == *number).map(drop)?)
            }),
        }
    }
}

/// Time round trips.
fn timed(count: u64, block: u64, mut round: impl FnMut(u64) -> Result<(), PingError>) -> Result<Rounds, PingError> {
    let mut rounds = Rounds { times: Vec::with_capacity((count / block.max(1)) as usize), ..Rounds::default() };
    let began = Instant::now();
    let mut last = began;
    while rounds.count < count {
        let value = value(rounds.count);
        round(value)?;
        rounds.sum += value;
        rounds.count += 1;
        if rounds.count % block == 0 {
            let now = Instant::now();
            rounds.times.push((now - last).as_nanos() as u64 / block);
            last = now;
        }
    }
    rounds.nanoseconds = began.elapsed().as_nanos() as u64;
    rounds.times.sort_unstable();
    Ok(rounds)
}

impl Echo {
    /// Ready to answer, with a ring at the `places` that the other side told.
    pub fn new(shared: Shared, way: Way, places: [u64; 3]) -> Result<Self, PingError> {
        let words = bare::Words::new(shared.area.clone());
        let end = match way {
            Way::Eventfds => End::Eventfds,
            Way::Lines => End::Lines { words, number: 0 },
            Way::BareSplit => End::Split(bare::SplitDevice::new(words, RING, ADDRESS, SIZE)),
            Way::BarePacked => End::Packed(bare::PackedDevice::new(words, RING, ADDRESS, SIZE)),
            Way::Ring { packed, notified } => {
                let memory = Memory::new(1, 1 << 30);
                memory.add(ADDRESS, &shared.area, 0, shared.area.size() as u64, true)?;
                let [desc, driver, device] = places;
                let features = Shared::features(packed);
                let setup = Setup { size: u32::from(SIZE), desc, driver, device, features, resume: None };
                End::Ring { ring: DeviceRing::new(Arc::new(memory), u32::from(SIZE), setup)?, notified }
            }
        };
        Ok(Self { shared, end })
    }

    /// Answer `count` times.
    pub fn run(&mut self, count: u64) -> Result<Rounds, PingError> {
        let Self { shared, end } = self;
        let [kick, call] = shared.bells;
        match end {
            End::Ring { ring, notified } => {
                let notified = *notified;
                let mut chains: Vec<Chain> = Vec::with_capacity(1);
                counted(count, || {
                    chains.clear();
                    let mut patience = Patience::default();
                    loop {
                        if notified {
                            ring.take(1, &mut chains)?;
                        } else {
                            ring.poll(1, &mut chains)?;
                        }
                        match (chains.is_empty(), notified) {
                            (false, _) => break,
                            (true, true) => drop(hear(&kick)?),
                            (true, false) => patience.glance()?,
                        }
                    }
                    let mut word = [0u8; 8];
                    chains[0].readable().read_once(0, &mut word);
                    if ring.complete_chains(chains.iter().map(|chain| (chain, 0)))? && notified {
                        say(&call)?;
                    }
                    Ok(u64::from_le_bytes(word))
                })
            }
            End::Eventfds => counted(count, || {
                let value = hear(&kick)?;
                say(&call)?;
                Ok(value)
            }),
            End::Split(ring) => counted(count, || Ok(ring.round()?)),
            End::Packed(ring) => counted(count, || Ok(ring.round()?)),
            End::Lines { words, number } => counted(count, || {
                *number += 1;
                let word = words.wait64(LINES[0], |word| word >> 32 == *number)?;
                words.store64(LINES[1], *number, Ordering::Release);
                Ok(word & 0xffff_ffff)
            }),
        }
    }
}

fn counted(count: u64, mut round: impl FnMut() -> Result<u64, PingError>) -> Result<Rounds, PingError> {
    let mut rounds = Rounds::default();
    let began = Instant::now();
    while rounds.count < count {
        rounds.sum += round()?;
        rounds.count += 1;
    }
    rounds.nanoseconds = began.elapsed().as_nanos() as u64;
    Ok(rounds)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

    use super::*;

    fn area() -> File {
        // SAFETY: a name that ends with a zero.
        let fd = unsafe { libc::memfd_create(c"pingpong".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: just made.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(Shared::bytes_needed() as u64).unwrap();
        file
    }

    fn eventfd() -> OwnedFd {
        // SAFETY: no pointers; the descriptor is owned by nobody else.
        unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) }
    }

    #[test]
    fn both_sides_see_the_same_values_whatever_carries_them() {
        let rings = [(false, false), (false, true), (true, false), (true, true)];
        let ways = [Way::Eventfds, Way::Lines, Way::BareSplit, Way::BarePacked]
            .into_iter()
            .chain(rings.map(|(packed, notified)| Way::Ring { packed, notified }));
        for way in ways {
            let (file, bells) = (area(), [eventfd(), eventfd()]);
            let fds = [bells[0].as_raw_fd(), bells[1].as_raw_fd()];
            let shared = || {
                let mapping = Mapping::new(file.as_fd(), Shared::bytes_needed(), 0, true).unwrap();
                Shared::new(Arc::new(mapping), fds).unwrap()
            };
            let mut ping = Ping::new(shared(), way).unwrap();
            let mut echo = Echo::new(shared(), way, ping.places()).unwrap();
            // More than the ring has descriptors, so that every layout goes round; in two goes.
            for count in [300, 700] {
                let (said, heard) = std::thread::scope(|scope| {
                    let echo = scope.spawn(|| echo.run(count).unwrap());
                    (ping.run(count, 10).unwrap(), echo.join().unwrap())
                });
                assert_eq!((said.count, said.times.len()), (count, count as usize / 10), "{way:?}");
                assert_eq!((heard.count, heard.sum), (count, said.sum), "{way:?}");
                assert!(said.times.is_sorted());
            }
        }
    }
}
