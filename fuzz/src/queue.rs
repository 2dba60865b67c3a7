//! A queue that an engine serves, and a driver that writes what it likes into its ring, of either layout.

use std::sync::Arc;

use vbus_engine::queue::{Queue, Running};
use vbus_ring::ring::{DeviceRing, Features, Setup};
use vbus_ring::signal::Notify;

use crate::world::{World, PLACES};
use crate::{Input, Seed};

/// The largest size of a queue.
const MAX_SIZE: u32 = 1024;
/// Of a packed ring's descriptors.
const AVAIL: u16 = 0x80;
const USED: u16 = 0x8000;
/// Flags of a descriptor.
pub const NEXT: u8 = 1;
/// As above.
pub const WRITE: u8 = 2;

/// Who is notified hears nothing.
pub struct Silent;

impl Notify for Silent {
    fn notify(&self) {}

    fn counters(&self) -> [u64; 3] {
        [0; 3]
    }
}

/// A queue, and what its driver does next.
pub struct Side {
    /// What the engine is given.
    pub queue: Arc<Queue>,
    setup: Option<Setup>,
    /// Chains, or in a packed ring descriptors, that were offered.
    offered: u16,
}

impl Side {
    /// One that does not run, and is the engine's.
    pub fn new(queue: Arc<Queue>) -> Self {
        queue.set_native(true);
        Self { queue, setup: None, offered: 0 }
    }

    /// Start it, anywhere and of any size, or in vain.
    pub fn start(&mut self, world: &World, input: &mut Input<'_>) {
        let flags = input.u8();
        let size = u32::from(input.u8());
        let size = if size < 8 { 1 << size } else { size };
        let [desc, driver, device] = [(); 3].map(|()| World::address(input));
        let [packed, event_idx, indirect, in_order] = [1, 2, 4, 8].map(|bit| flags & bit != 0);
        let features = Features { packed, event_idx, indirect, in_order };
        let setup = Setup { size, desc, driver, device, features, resume: None };
        self.offered = 0;
        self.queue.replace(None);
        self.setup = DeviceRing::new(world.memory.clone(), MAX_SIZE, setup).ok().map(|ring| {
            self.queue.replace(Some(Running::new(ring, Arc::new(Silent))));
            setup
        });
    }

    /// Stop it. Whether the engine is done with its memory is another question.
    pub fn stop(&mut self) {
        self.queue.replace(None);
        self.setup = None;
    }

    /// Write a descriptor: into the table, or, by the first bit of `kind`, where indirect tables may be.
    pub fn describe(&self, world: &mut World, input: &mut Input<'_>) {
        let (kind, index) = (input.u8(), u64::from(input.u8()));
        let address = World::address(input);
        let size = if kind & 2 == 0 { u32::from(input.u16()) } else { input.u32() };
        let (flags, next) = (u16::from(input.u8()), u16::from(input.u8()));
        let table = match self.setup {
            Some(setup) if kind & 1 == 0 => setup.desc,
            _ => PLACES[0].address + 0x2000,
        };
        let words = [&address.to_le_bytes()[..], &size.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        world.put(table.wrapping_add(16 * index), &words.concat());
    }

    /// Make a chain available that begins with this descriptor; in a packed ring, the next with these flags and this id.
    pub fn offer(&mut self, world: &mut World, input: &mut Input<'_>) {
        let (head, flags) = (u16::from(input.u8()), u16::from(input.u8()));
        let Some(setup) = self.setup else { return };
        let size = setup.size as u16;
        let place = u64::from(self.offered % size);
        if setup.features.packed {
            let wrap = if self.offered / size % 2 == 0 { AVAIL } else { USED };
            let words = [head.to_le_bytes(), (flags | wrap).to_le_bytes()].concat();
            world.put(setup.desc.wrapping_add(16 * place + 12), &words);
            self.offered = self.offered.wrapping_add(1);
        } else {
            world.put(setup.driver.wrapping_add(4 + 2 * place), &head.to_le_bytes());
            self.offered = self.offered.wrapping_add(1);
            world.put(setup.driver.wrapping_add(2), &self.offered.to_le_bytes());
        }
    }
}

/// What `Side::start` reads: 8 descriptors, with the parts one after the other from this place in the first region on.
pub fn start_seed(seed: Seed, flags: u8, at: u16) -> Seed {
    seed.u8(flags).u8(3).u8(0).u16(at).u8(0).u16(at + 0x100).u8(0).u16(at + 0x200)
}

/// What `Side::describe` reads: a buffer of the first region.
pub fn describe_seed(seed: Seed, index: u8, at: u16, size: u16, flags: u8) -> Seed {
    seed.u8(0).u8(index).u8(0).u16(at).u16(size).u8(flags).u8(index + 1)
}
