//! Files that are truncated while they are mapped: the process lives, knows what it lost, and dies of all else.
#![cfg(not(loom))]

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use vbus_ring::mem::{Mapping, Memory, VolatileSlice, Window};
use vbus_ring::ring::split::DeviceRing;
use vbus_ring::ring::Chain;
use vbus_ring::ring::{Features, Setup};
use vbus_ring::violation::Violation;

const BYTES: usize = 0x10_000;

fn file(size: usize) -> File {
    // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(size as u64).unwrap();
    file
}

fn guarded(size: usize) -> (File, Arc<Mapping>) {
    let file = file(size);
    let mapping = Mapping::guarded(file.as_fd(), size, 0, true).unwrap();
    (file, Arc::new(mapping))
}

fn byte(mapping: &Mapping, at: usize) -> u8 {
    let mut byte = [0];
    mapping.slice(at, 1).copy_to(&mut byte[..]);
    byte[0]
}

fn name<T>(result: Result<T, Violation>) -> &'static str {
    result.err().expect("a violation").name()
}

#[test]
fn a_lost_mapping_is_zeroes_that_can_be_written() {
    let (file, mapping) = guarded(BYTES);
    let (_other, neighbour) = guarded(BYTES);
    let window = Window::new(mapping.clone(), 0, BYTES);
    window.store64(0, 7, Ordering::Relaxed);
    Window::new(neighbour.clone(), 0, 8).store64(0, 8, Ordering::Relaxed);
    file.set_len(0x1000).unwrap();
    assert!(!mapping.lost());
    assert_eq!((byte(&mapping, 0), mapping.lost()), (7, false), "what is there is there");
    assert_eq!((byte(&mapping, BYTES - 1), mapping.lost()), (0, true));
    assert_eq!(byte(&mapping, 0), 0, "all of it");
    window.store64(0x2000, 9, Ordering::Relaxed);
    assert_eq!((byte(&mapping, 0x2000), byte(&neighbour, 0), neighbour.lost()), (9, 8, false));
    file.set_len(BYTES as u64).unwrap();
    assert_eq!((byte(&mapping, 0x2000), mapping.lost()), (9, true), "it stays so");
}

#[test]
fn a_write_and_a_read_only_mapping_are_guarded_too() {
    let (file, mapping) = guarded(BYTES);
    file.set_len(0).unwrap();
    Window::new(mapping.clone(), 0, 8).store64(0, 5, Ordering::Relaxed);
    assert_eq!((byte(&mapping, 0), mapping.lost()), (5, true));

    let file = self::file(BYTES + 100);
    let mapping = Mapping::guarded(file.as_fd(), BYTES + 100, 0, false).unwrap();
    file.set_len(0).unwrap();
    assert_eq!((byte(&mapping, BYTES + 99), mapping.lost()), (0, true), "the last page, of which a part is mapped");
}

#[test]
fn slots_are_used_again_and_more_are_made() {
    let many: Vec<_> = (0..300).map(|_| guarded(0x1000)).collect();
    for (index, (file, mapping)) in many.iter().enumerate() {
        if index % 3 == 0 {
            file.set_len(0).unwrap();
            assert_eq!(byte(mapping, 0), 0);
        }
    }
    assert!(many.iter().enumerate().all(|(index, (_, mapping))| mapping.lost() == (index % 3 == 0)));
    drop(many);
    for _ in 0..1000 {
        let (_, mapping) = guarded(0x1000);
        assert!(!mapping.lost(), "the slot's last user was, perhaps");
    }
}

#[test]
fn threads_that_touch_what_is_truncated_while_others_come_and_go() {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let some: Vec<_> = (0..20).map(|_| guarded(0x3000)).collect();
                    assert!(some.iter().all(|(_, mapping)| byte(mapping, 0x2000) == 0 && !mapping.lost()));
                }
            });
        }
        for _ in 0..200 {
            let (file, mapping) = guarded(BYTES);
            let start = Barrier::new(3);
            std::thread::scope(|scope| {
                for thread in 0..2 {
                    let (mapping, start) = (&mapping, &start);
                    scope.spawn(move || {
                        start.wait();
                        while !mapping.lost() {
                            for page in 0..16 {
                                Window::new(mapping.clone(), page * 0x1000, 8).store64(0, thread, Ordering::Relaxed);
                            }
                        }
                    });
                }
                start.wait();
                file.set_len(0).unwrap();
            });
            assert!(mapping.lost());
        }
        stop.store(true, Ordering::Relaxed);
    });
}

const BASE: u64 = 0x10_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const DATA: u64 = 0x4000;

/// A ring of 8 with its parts, and its buffers, in a file each.
struct World {
    memory: Arc<Memory>,
    ring_file: File,
    data_file: File,
}

impl World {
    fn new() -> Self {
        let memory = Arc::new(Memory::new(2, 1 << 20));
        let (ring_file, ring) = guarded(DATA as usize);
        let (data_file, data) = guarded(BYTES);
        memory.add(BASE, &ring, 0, DATA, true).unwrap();
        memory.add(BASE + DATA, &data, 0, BYTES as u64, true).unwrap();
        let window = Window::new(ring, 0, DATA as usize);
        for head in 0..8 {
            window.store64(16 * head, BASE + DATA, Ordering::Relaxed);
            window.store64(16 * head + 8, 8 | 2 << 32, Ordering::Relaxed);
            window.store16(AVAIL as usize + 4 + 2 * head, head as u16, Ordering::Relaxed);
        }
        window.store16(AVAIL as usize + 2, 8, Ordering::Relaxed);
        Self { memory, ring_file, data_file }
    }

    fn setup() -> Setup {
        let (driver, device) = (BASE + AVAIL, BASE + USED);
        Setup { size: 8, desc: BASE, driver, device, features: Features::default(), resume: None }
    }

    fn ring(&self) -> Result<DeviceRing, Violation> {
        DeviceRing::new(self.memory.clone(), 8, Self::setup())
    }

    fn read(&self, address: u64) -> Result<(), Violation> {
        self.memory.read(address, VolatileSlice::from(&mut [0; 8][..]))
    }

    fn write(&self, address: u64) -> Result<(), Violation> {
        self.memory.write(address, VolatileSlice::from(&mut [0; 8][..]))
    }
}

fn take(ring: &mut DeviceRing, limit: usize) -> Result<Vec<Chain>, Violation> {
    let mut chains = Vec::new();
    let result = ring.take(limit, &mut chains);
    assert!(result.is_ok() || chains.is_empty());
    result.map(|()| chains)
}

#[test]
fn a_ring_whose_file_was_truncated() {
    let world = World::new();
    let mut ring = world.ring().unwrap();
    assert_eq!(take(&mut ring, 2).unwrap().len(), 2);
    world.ring_file.set_len(0).unwrap();
    assert_eq!(name(take(&mut ring, 2)), "region-lost");
    assert!(take(&mut ring, 2).unwrap().is_empty());
    assert_eq!(name(ring.complete([(0, 0)])), "region-lost");
    assert_eq!(name(world.ring()), "region-lost", "until the memory is another");
    assert_eq!(name(world.read(BASE + DATA)), "region-lost");

    let world = World::new();
    let mut ring = world.ring().unwrap();
    let chains = take(&mut ring, 2).unwrap();
    world.ring_file.set_len(0).unwrap();
    assert_eq!(name(ring.complete_chains(chains.iter().map(|chain| (chain, 0)))), "region-lost");
    assert!(take(&mut ring, 2).unwrap().is_empty());

    let world = World::new();
    world.ring_file.set_len(0).unwrap();
    assert_eq!(name(world.ring()), "region-lost");
}

#[test]
fn buffers_whose_file_was_truncated() {
    let world = World::new();
    let mut ring = world.ring().unwrap();
    let chains = take(&mut ring, 1).unwrap();
    world.data_file.set_len(0).unwrap();
    assert_eq!(take(&mut ring, 1).unwrap().len(), 1, "nobody has touched them");
    chains[0].writable().write(0, VolatileSlice::from(&mut [1; 8][..]));
    assert_eq!(name(ring.complete([(0, 8)])), "region-lost");
    assert_eq!(name(world.write(BASE)), "region-lost");

    for access in [World::read, World::write] {
        let world = World::new();
        access(&world, BASE + DATA).unwrap();
        world.data_file.set_len(0).unwrap();
        access(&world, BASE).unwrap();
        assert_eq!(name(access(&world, BASE + DATA)), "region-lost");
    }
}

#[test]
fn a_region_that_was_lost_before_it_was_added() {
    let world = World::new();
    let mut ring = world.ring().unwrap();
    let (file, lost) = guarded(0x1000);
    file.set_len(0).unwrap();
    byte(&lost, 0);
    assert_eq!(take(&mut ring, 1).unwrap().len(), 1);
    world.memory.remove(BASE + DATA).unwrap();
    world.memory.add(0, &lost, 0, 0x1000, true).unwrap();
    assert_eq!(name(take(&mut ring, 1)), "region-lost");
}

#[test]
fn what_others_lost_is_not_ours() {
    let (file, lost) = guarded(0x1000);
    file.set_len(0).unwrap();
    byte(&lost, 0);
    let world = World::new();
    let mut ring = world.ring().unwrap();
    assert_eq!(take(&mut ring, 8).unwrap().len(), 8);
    assert!(ring.complete([(0, 0)]).is_ok());
    world.write(BASE + DATA).unwrap();
    // A region that is taken away takes its blame along.
    world.data_file.set_len(0).unwrap();
    assert_eq!(name(world.read(BASE + DATA)), "region-lost");
    world.memory.remove(BASE + DATA).unwrap();
    world.read(BASE).unwrap();
    assert!(ring.complete([(1, 0)]).is_ok());
}

#[test]
fn what_is_in_flight_and_the_log_can_be_lost_as_well() {
    for at_start in [true, false] {
        let world = World::new();
        let (file, region) = guarded(0x1000);
        let start = || DeviceRing::tracked(world.memory.clone(), 8, World::setup(), &region, 0);
        if at_start {
            file.set_len(0).unwrap();
            assert_eq!(name(start()), "region-lost");
        } else {
            let mut ring = start().unwrap();
            assert_eq!(take(&mut ring, 1).unwrap().len(), 1);
            file.set_len(0).unwrap();
            assert_eq!(name(take(&mut ring, 1)), "region-lost");
            assert_eq!(name(ring.complete([(0, 0)])), "region-lost");
        }
    }

    let world = World::new();
    let mut ring = world.ring().unwrap();
    let (file, log) = guarded(0x1000);
    world.memory.log(Some(log));
    world.write(BASE + DATA).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(name(world.write(BASE + DATA)), "region-lost");
    assert_eq!(name(take(&mut ring, 1)), "region-lost");
    world.memory.log(None);
    world.write(BASE + DATA).unwrap();
}

/// Run a test of this file in a process of its own, in which `CHILD` is set.
fn child(test: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap().status
}

const CHILD: &str = "VBUS_TEST_GUARD_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// A bus error that has nothing to do with guarded mappings.
fn stray_fault() -> ! {
    let file = file(0x1000);
    let mapping = Mapping::new(file.as_fd(), 0x1000, 0, true).unwrap();
    file.set_len(0).unwrap();
    byte(&mapping, 0);
    std::process::exit(3);
}

fn touch_a_guarded_one() {
    let (file, mapping) = guarded(0x1000);
    file.set_len(0).unwrap();
    byte(&mapping, 0);
    assert!(mapping.lost());
}

#[test]
fn another_bus_error_still_kills() {
    if is_child() {
        touch_a_guarded_one();
        stray_fault();
    }
    assert_eq!(child("another_bus_error_still_kills").signal(), Some(libc::SIGBUS));
}

#[test]
fn a_bus_error_that_was_sent_still_kills() {
    if is_child() {
        // The handler of Rust's own, here from before, would let it pass.
        // SAFETY: no memory is involved.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        touch_a_guarded_one();
        // SAFETY: as above; to this thread, so that it has come when the call returns.
        unsafe { libc::raise(libc::SIGBUS) };
        std::process::exit(3);
    }
    assert_eq!(child("a_bus_error_that_was_sent_still_kills").signal(), Some(libc::SIGBUS));
}

#[test]
fn one_that_was_sent_and_ignored_is_still_ignored() {
    if is_child() {
        // SAFETY: no memory is involved.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_IGN) };
        touch_a_guarded_one();
        // SAFETY: as above; to this thread, so that it has come when the call returns.
        unsafe { libc::raise(libc::SIGBUS) };
        std::process::exit(4);
    }
    assert_eq!(child("one_that_was_sent_and_ignored_is_still_ignored").code(), Some(4));
}

extern "C" fn plain(_: libc::c_int) {
    // SAFETY: it never returns.
    unsafe { libc::_exit(5) }
}

extern "C" fn with_info(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: it never returns; the system gave the information.
    unsafe { libc::_exit(if (*info).si_code == 2 { 6 } else { 7 }) }
}

#[test]
fn the_handler_from_before_gets_all_others() {
    fn before(handler: usize, flags: libc::c_int) {
        // SAFETY: an action of zeroes is a valid one, and the handler is as its flags say.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            (action.sa_sigaction, action.sa_flags) = (handler, flags);
            assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
        }
        touch_a_guarded_one();
        stray_fault();
    }
    match std::env::var(CHILD).as_deref() {
        Ok("plain") => before(plain as extern "C" fn(_) as usize, 0),
        Ok(_) => before(with_info as extern "C" fn(_, _, _) as usize, libc::SA_SIGINFO),
        Err(_) => (),
    }
    for (kind, code) in [("plain", 5), ("info", 6)] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_handler_from_before_gets_all_others", "--nocapture"]).env(CHILD, kind);
        assert_eq!(command.output().unwrap().status.code(), Some(code), "{kind}");
    }
}
