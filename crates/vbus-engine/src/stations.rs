//! Where stations are: the table of a learning switch, and what each of its ports may do.
//!
//! A station is an address together with the tag of its network (802.1Q), as one address may be in several. It is where
//! a frame from it came from last, for as long as it says something now and then. How many there are is limited, for each
//! port and in all: a driver that makes up addresses takes no place from others, and what has no place is flooded.

use std::collections::HashMap;

/// Nanoseconds for which a station that says nothing is known, as of Linux's bridges.
pub const AGEING: u64 = 300 * SECOND;
/// Stations in all, and of one port.
pub const MOST: usize = 4096;
/// As above.
pub const MOST_OF_PORT: usize = 1024;
/// Floods a second, unless something else is said; a tenth of that at once.
pub const FLOODS: u32 = 10_000;

const SECOND: u64 = 1_000_000_000;
/// Nanoseconds between two searches for stations that are known no more.
const SWEEP: u64 = SECOND;
const TAG: [u8; 2] = [0x81, 0];

/// Bytes of a frame by which it is switched: addresses, type and tag.
pub const BEGINNING: usize = 16;

/// Where a frame comes from and goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    to: u64,
    from: u64,
}

/// In an address of ours: to more than one station.
const GROUP: u64 = 1 << 56;

impl Addresses {
    /// Of a frame that begins so; what is not there counts as zeroes.
    #[inline]
    pub fn of(beginning: &[u8; BEGINNING]) -> Self {
        let tag =
            if beginning[12..14] == TAG { u64::from(beginning[14] & 15) << 8 | u64::from(beginning[15]) } else { 0 };
        let address = |at: usize| {
            let bytes: [u8; 8] = std::array::from_fn(|byte| beginning[at + byte]);
            u64::from_be_bytes(bytes) & !0xffff | tag
        };
        Self { to: address(0), from: address(6) }
    }
}

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its station is at the port that it came from, or at one that this one does not talk with.
    Nowhere,
    /// To all, which is beyond the limit.
    Limited,
    /// To the port with this number.
    To(usize),
    /// To all ports but its own that it talks with.
    Flood,
}

/// What a port counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Frames to all.
    pub flooded: u64,
    /// Frames that were to go to all, beyond the limit.
    pub flood_dropped: u64,
    /// Stations that were learned here,
    pub learned: u64,
    /// and that were at another port before.
    pub moved: u64,
}

/// A limit of so many a second.
#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Nanoseconds for each, and for all that may come at once.
    each: u64,
    at_once: u64,
    /// When all that came will have had its time.
    paid: u64,
}

impl Rate {
    fn new(a_second: u32) -> Self {
        let each = SECOND / u64::from(a_second.max(1));
        Self { each, at_once: each.max(SECOND / 10), paid: 0 }
    }

    /// Whether one may come that costs as much as `cost` others.
    fn admit(&mut self, cost: u32, now: u64) -> bool {
        let paid = self.paid.max(now);
        if paid - now > self.at_once - self.each {
            return false;
        }
        self.paid = paid + u64::from(cost) * self.each;
        true
    }
}

#[derive(Clone, Copy, Debug)]
struct Port {
    up: bool,
    isolated: bool,
    floods: Rate,
    stations: usize,
    counted: Counted,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    port: usize,
    seen: u64,
}

/// The table.
#[derive(Debug)]
pub struct Stations {
    ageing: u64,
    ports: Vec<Option<Port>>,
    places: HashMap<u64, Place>,
    swept: u64,
}

impl Stations {
    /// Without ports. `ageing`: nanoseconds.
    pub fn new(ageing: u64) -> Self {
        Self { ageing, ports: Vec::new(), places: HashMap::new(), swept: 0 }
    }

    /// A new port, which is down; gives its number.
    pub fn join(&mut self) -> usize {
        let port =
            Port { up: false, isolated: false, floods: Rate::new(FLOODS), stations: 0, counted: Counted::default() };
        match self.ports.iter().position(Option::is_none) {
            Some(free) => {
                self.ports[free] = Some(port);
                free
            }
            None => {
                self.ports.push(Some(port));
                self.ports.len() - 1
            }
        }
    }

    /// The port is gone, and its number may be another's.
    pub fn leave(&mut self, port: usize) {
        self.forget(port);
        self.ports[port] = None;
    }

    /// Whether frames go to it. One that goes down takes what was learned there with it.
    pub fn set_up(&mut self, port: usize, up: bool) {
        if !up {
            self.forget(port);
        }
        if let Some(port) = &mut self.ports[port] {
            port.up = up;
        }
    }

    /// Isolated ports do not talk with each other.
    pub fn isolate(&mut self, port: usize, isolated: bool) {
        if let Some(port) = &mut self.ports[port] {
            port.isolated = isolated;
        }
    }

    /// How many frames a second this port may send to all.
    pub fn limit_floods(&mut self, port: usize, a_second: u32) {
        if let Some(port) = &mut self.ports[port] {
            port.floods = Rate::new(a_second);
        }
    }

    /// What it counted.
    pub fn counted(&self, port: usize) -> Counted {
        self.ports.get(port).copied().flatten().map(|port| port.counted).unwrap_or_default()
    }

    /// How many stations are known to be there.
    pub fn known(&self, port: usize) -> usize {
        self.ports.get(port).copied().flatten().map_or(0, |port| port.stations)
    }

    fn forget(&mut self, number: usize) {
        if let Some(port) = self.ports[number].as_mut().filter(|port| port.stations > 0) {
            port.stations = 0;
            self.places.retain(|_, place| place.port != number);
        }
    }

    /// Whether a frame that came from one port may go to the other.
    #[inline]
    pub fn may_go(&self, from: usize, to: usize) -> bool {
        match (self.ports.get(from), self.ports.get(to)) {
            (Some(Some(one)), Some(Some(other))) => from != to && other.up && !(one.isolated && other.isolated),
            _ => false,
        }
    }

    /// A frame came from this port: learn where its sender is, and say where it goes. `cost`: as how many frames it
    /// counts when it goes to all. `now`: nanoseconds that never go back.
    #[inline]
    pub fn forward(&mut self, from: usize, addresses: Addresses, cost: u32, now: u64) -> Way {
        self.learn(from, addresses.from, now);
        if addresses.to & GROUP == 0 {
            if let Some(place) = self.places.get(&addresses.to) {
                if now.saturating_sub(place.seen) <= self.ageing {
                    return if self.may_go(from, place.port) { Way::To(place.port) } else { Way::Nowhere };
                }
            }
        }
        let Some(Some(port)) = self.ports.get_mut(from) else { return Way::Nowhere };
        if !port.floods.admit(cost, now) {
            port.counted.flood_dropped += 1;
            return Way::Limited;
        }
        port.counted.flooded += 1;
        Way::Flood
    }

    #[inline]
    fn learn(&mut self, from: usize, station: u64, now: u64) {
        // No station has an address of several, or of none.
        if station & GROUP != 0 || station & !0xffff == 0 {
            return;
        }
        if let Some(place) = self.places.get_mut(&station) {
            if place.port == from {
                place.seen = now;
                return;
            }
        }
        self.learn_anew(from, station, now);
    }

    fn learn_anew(&mut self, from: usize, station: u64, now: u64) {
        if !self.ports.get(from).copied().flatten().is_some_and(|port| port.up) {
            return;
        }
        // Looking through all of them takes a while: not for every frame of who makes up addresses.
        if !self.has_place(from, station) && now.saturating_sub(self.swept) >= SWEEP {
            self.sweep(now);
        }
        if self.has_place(from, station) {
            self.enter(from, station, now);
        }
    }

    fn has_place(&self, port: usize, station: u64) -> bool {
        let of_port = self.ports[port].map_or(MOST_OF_PORT, |port| port.stations);
        of_port < MOST_OF_PORT && (self.places.len() < MOST || self.places.contains_key(&station))
    }

    fn enter(&mut self, from: usize, station: u64, now: u64) {
        let before = self.places.insert(station, Place { port: from, seen: now });
        if let Some(port) = before.and_then(|place| self.ports[place.port].as_mut()) {
            port.stations -= 1;
        }
        // One that had been silent for so long was not known to be anywhere.
        let moved = before.is_some_and(|place| now.saturating_sub(place.seen) <= self.ageing);
        if let Some(port) = &mut self.ports[from] {
            port.stations += 1;
            port.counted.learned += 1;
            port.counted.moved += u64::from(moved);
        }
    }

    /// Forget stations that were silent for too long.
    fn sweep(&mut self, now: u64) {
        let Self { places, ports, ageing, swept, .. } = self;
        *swept = now;
        places.retain(|_, place| {
            let stays = now.saturating_sub(place.seen) <= *ageing;
            if let (false, Some(port)) = (stays, &mut ports[place.port]) {
                port.stations -= 1;
            }
            stays
        });
    }
}
