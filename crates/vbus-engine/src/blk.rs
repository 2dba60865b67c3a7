//! A disk behind io_uring (virtio 1.3, section 5.2): reads, writes and flushes of one queue, many under way at a time.
//!
//! Requests of a batch are submitted with one system call, and what is ready after it is given back together. What is
//! none of the three, or not as it should be, goes to the device model, which answers it as if there were no engine.
//!
//! Requests that are under way together have no order (section 5.2.6.2): a flush promises what was completed before it
//! was made available, which is in the file by then. The kernel accesses the driver's memory itself: whoever stops the
//! queue waits until nothing is under way (`settle`) before the driver hears of it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use io_uring::{opcode, squeue, types, IoUring};
use vbus_ring::mem::Table;
use vbus_ring::ring::{read_words, Burst, Piece, HEAVY};
use vbus_ring::signal::Notify;

use crate::outbox::{Fault, Outbox};
use crate::queue::Queue;
use crate::worker::{Engine, Turn};

const SECTOR: u64 = 512;
const HEADER: usize = 16;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;

/// Requests under way at a time; more wait in the ring.
const DEPTH: usize = 128;
/// Requests that are submitted together: a driver has the first back while the next are under way.
const BATCH: usize = 16;
/// Batches of a turn.
const BUDGET: usize = 4;
/// Buffers that one operation takes.
const IOV_MAX: usize = 1024;
/// Parts that there is room for in what is kept for its allocations.
const SPARE_PARTS: usize = 256;
/// Where the file is registered with its ring.
const FILE: types::Fixed = types::Fixed(0);
/// Operations that may block the kernel's threads at a time, of all disks of a worker: so many that those of a few disks
/// that hang leave room for all others.
const BLOCKED: u32 = 4096;
/// Bytes of a request that a worker does not move itself.
const LONG: u64 = 1 << 20;
/// How often an operation is tried again that was only interrupted.
const TRIES: u32 = 1000;

/// Whether this process may use io_uring; the system's reason when not.
pub fn permitted() -> io::Result<()> {
    make_ring(2).map(drop)
}

fn make_ring(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // By one thread, which is not known yet and is not interrupted for completions (Linux 6.0). They are not deferred
    // until it asks for them, either: whoever waits for the ring in epoll would not be told of them.
    builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag().setup_r_disabled();
    match builder.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled();
            builder.build(entries)
        }
        made => made,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// A request under way.
struct Slot {
    kind: Kind,
    head: u16,
    run: u64,
    /// Keeps the memory mapped, while it is under way.
    table: Option<Arc<Table>>,
    /// All data, and what of it is left after a part was moved, when that is less.
    data: Vec<libc::iovec>,
    left: Vec<libc::iovec>,
    offset: u64,
    bytes: u64,
    through: bool,
    status: *mut u8,
    /// Driver address and bytes of what may be written.
    ranges: Vec<(u64, u64)>,
    readable: u64,
    writable: u32,
    tries: u32,
}

impl Slot {
    /// It is over: nothing of the driver is kept, and no more room than most requests need.
    fn clear(&mut self) {
        self.table = None;
        for parts in [&mut self.data, &mut self.left] {
            parts.clear();
            parts.shrink_to(SPARE_PARTS);
        }
        self.ranges.clear();
        self.ranges.shrink_to(SPARE_PARTS);
    }
}

// A slot stays where it is from its beginning to its end, and is moved about as a pointer.
#[allow(clippy::vec_box)]
struct State {
    /// The file is registered with it, as its first.
    ring: IoUring,
    burst: Burst,
    slots: Vec<Option<Box<Slot>>>,
    free: Vec<u32>,
    /// Kept for their allocations.
    spare: Vec<Box<Slot>>,
    /// Finished, and not shown.
    done: Vec<Box<Slot>>,
    under_way: usize,
    /// Operations that are queued and not submitted.
    queued: u32,
    /// What is wrong with the queue, of this run: nothing more is taken, and it is told when what came before is over.
    fault: Option<(u64, Option<Fault>)>,
}

// SAFETY: pointers to memory that others write anyway, which the tables beside them keep mapped.
unsafe impl Send for State {}

/// What comes of giving back requests, to be done without locks.
#[derive(Default)]
struct Shown {
    notify: Option<Arc<dyn Notify>>,
    /// With the run of the queue.
    fault: Option<(u64, Fault)>,
}

/// What the device model sets at any time.
#[derive(Debug, Default)]
pub struct Settings {
    /// Sectors of the disk.
    pub capacity: AtomicU64,
    /// Whether writes are refused.
    pub read_only: AtomicBool,
    /// Whether a write is on the disk when it is completed.
    pub through: AtomicBool,
    /// Whether the driver may flush.
    pub flush: AtomicBool,
}

/// What was served.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// Requests that failed because the disk failed.
    pub io_errors: AtomicU64,
}

/// What others may wait for the end of.
#[derive(Debug, Default)]
struct UnderWay {
    count: usize,
    /// How many wait: to wake nobody is a system call, too.
    waiting: usize,
}

/// The engine of one queue.
pub struct Blk {
    queue: Arc<Queue>,
    /// Until the engine has ended.
    state: Mutex<Option<State>>,
    under_way: Mutex<UnderWay>,
    settled: Condvar,
    /// As the device model has them.
    pub settings: Settings,
    /// What was served.
    pub counters: Counters,
    /// What the device model hears of.
    pub outbox: Outbox,
}

impl Blk {
    /// For a queue, on a file or a block device. `signal`: tells the device model that there is something in the outbox.
    ///
    /// The error is the system's: io_uring is not permitted, or there is no memory for it.
    pub fn new(queue: Arc<Queue>, fd: OwnedFd, signal: Arc<dyn Notify>) -> io::Result<Self> {
        let ring = make_ring(DEPTH as u32)?;
        // The kernel looks it up once, and not for every operation.
        ring.submitter().register_files(&[fd.as_raw_fd()])?;
        let state = State {
            ring,
            burst: Burst::default(),
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as u32).rev().collect(),
            spare: Vec::new(),
            done: Vec::new(),
            under_way: 0,
            queued: 0,
            fault: None,
        };
        Ok(Self {
            queue,
            state: Mutex::new(Some(state)),
            under_way: Mutex::default(),
            settled: Condvar::new(),
            settings: Settings::default(),
            counters: Counters::default(),
            outbox: Outbox::new(signal),
        })
    }

    fn wait(&self, timeout: Duration) -> bool {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.waiting += 1;
        let busy = |under_way: &mut UnderWay| under_way.count > 0;
        let waited = self.settled.wait_timeout_while(under_way, timeout, busy);
        let (mut under_way, _) = waited.unwrap_or_else(PoisonError::into_inner);
        under_way.waiting -= 1;
        under_way.count == 0
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests begin, or end.
    fn tell(&self, now: usize) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.count = now;
        if now == 0 && under_way.waiting > 0 {
            self.settled.notify_all();
        }
    }

    /// Take requests off the ring and queue their operations; how many there were, and whether they take long.
    fn take(&self, state: &mut State, ask: bool) -> (usize, bool) {
        let limit = BATCH.min(state.free.len());
        let run = {
            let mut running = self.queue.serve();
            let Some(running) = running.as_mut().filter(|_| !self.queue.held()) else { return (0, false) };
            let run = self.queue.run();
            match &state.fault {
                Some((of, _)) if *of == run => return (0, false),
                _ => state.fault = None,
            }
            if let Err(violation) = running.ring.burst(limit, &mut state.burst, ask) {
                state.fault = Some((run, Some(Fault::of(0, &violation))));
                return (0, false);
            }
            // Before whoever stops the queue knows that it has stopped.
            if !state.burst.is_empty() {
                self.tell(state.under_way + state.burst.len());
            }
            run
        };
        let (taken, heavy) = (state.burst.len(), state.burst.weight() >= HEAVY);
        for chain in 0..taken {
            if let Some(fault) = fault(&state.burst, chain) {
                // Those behind it are not answered, and it is not, either.
                state.fault = Some((run, Some(fault)));
                break;
            }
            match self.request(state, chain, run) {
                Some(slot) => {
                    let index = state.free.pop().expect("no more are taken than are free");
                    state.slots[index as usize] = Some(slot);
                    state.under_way += 1;
                    self.push(state, index);
                }
                None => self.outbox.request(0, run, state.burst.chain(chain)),
            }
        }
        if taken > 0 {
            state.burst.clear();
            self.tell(state.under_way);
        }
        (taken, heavy)
    }

    /// What a chain asks for, unless it is for the device model.
    fn request(&self, state: &mut State, chain: usize, run: u64) -> Option<Box<Slot>> {
        let State { burst, spare, .. } = state;
        let (readable, writable) = (burst.readable_total(chain), burst.writable_total(chain));
        let [kind, _, low, high] = read_words(burst.readable(chain))?;
        let sector = u64::from(high) << 32 | u64::from(low);
        let settings = &self.settings;
        let (kind, bytes) = match kind {
            IN => (Kind::Read, writable - 1),
            OUT if writable == 1 && !settings.read_only.load(Ordering::Acquire) => {
                (Kind::Write, readable - HEADER as u64)
            }
            FLUSH if writable == 1 && settings.flush.load(Ordering::Acquire) => (Kind::Flush, 0),
            _ => return None,
        };
        if kind != Kind::Flush {
            let end = sector.checked_add(bytes / SECTOR);
            let inside = end.is_some_and(|end| end <= settings.capacity.load(Ordering::Acquire));
            if bytes == 0 || bytes % SECTOR != 0 || !inside {
                return None;
            }
        }
        let last = burst.writable(chain).last()?;
        // SAFETY: the last byte of the piece.
        let status = unsafe { last.as_ptr().add(last.size() - 1) };
        let table = Some(burst.table(chain).clone());
        let mut slot = match spare.pop() {
            Some(mut slot) => {
                slot.table = table;
                slot
            }
            None => Box::new(Slot {
                kind,
                head: 0,
                run,
                table,
                data: Vec::new(),
                left: Vec::new(),
                offset: 0,
                bytes: 0,
                through: false,
                status,
                ranges: Vec::new(),
                readable: 0,
                writable: 0,
                tries: 0,
            }),
        };
        (slot.kind, slot.head, slot.run, slot.status) = (kind, burst.head(chain), run, status);
        // An offset in a file has 63 bits; a sector that has not is beyond the disk.
        (slot.offset, slot.bytes, slot.tries) = (sector.wrapping_mul(SECTOR), bytes, 0);
        slot.through = settings.through.load(Ordering::Acquire);
        (slot.readable, slot.writable) = (readable, writable as u32);
        slot.left.clear();
        slot.data.clear();
        match kind {
            Kind::Read => gather(burst.writable(chain), 0, bytes, &mut slot.data),
            Kind::Write => gather(burst.readable(chain), HEADER as u64, bytes, &mut slot.data),
            Kind::Flush => {}
        }
        slot.ranges.clear();
        slot.ranges.extend(burst.ranges(chain));
        Some(slot)
    }

    /// Queue the operation of a request, or of what is left of it.
    fn push(&self, state: &mut State, index: u32) {
        let Some(slot) = &state.slots[index as usize] else { return };
        let fd = FILE;
        let parts = if slot.left.is_empty() { &slot.data } else { &slot.left };
        let flags = if slot.through { libc::RWF_DSYNC } else { 0 };
        let entry = match (slot.kind, parts.as_slice()) {
            (Kind::Flush, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            (Kind::Read, [part]) => {
                let size = part.iov_len.min(1 << 30) as u32;
                opcode::Read::new(fd, part.iov_base.cast(), size).offset(slot.offset).build()
            }
            (Kind::Write, [part]) => {
                let size = part.iov_len.min(1 << 30) as u32;
                opcode::Write::new(fd, part.iov_base.cast(), size).offset(slot.offset).rw_flags(flags).build()
            }
            (Kind::Read, parts) => {
                let count = parts.len().min(IOV_MAX) as u32;
                opcode::Readv::new(fd, parts.as_ptr(), count).offset(slot.offset).build()
            }
            (Kind::Write, parts) => {
                let count = parts.len().min(IOV_MAX) as u32;
                opcode::Writev::new(fd, parts.as_ptr(), count).offset(slot.offset).rw_flags(flags).build()
            }
        };
        // What is in the page cache is moved by whoever submits it: much of it, by a thread of the kernel.
        let long = slot.kind != Kind::Flush && slot.bytes >= LONG;
        let flags = if long { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        self.queue_entry(state, &entry.flags(flags).user_data(u64::from(index)));
    }

    fn queue_entry(&self, state: &mut State, entry: &squeue::Entry) {
        // SAFETY: the buffers and the list of them live in the slot until the operation is over.
        let queued = unsafe { state.ring.submission().push(entry) };
        // There are as many places as slots, and each has one operation.
        debug_assert!(queued.is_ok());
        state.queued += 1;
    }

    /// Let the kernel have what is queued, and do what it has to do in this thread.
    fn submit(&self, state: &mut State) {
        const GET_EVENTS: u32 = 1;
        let wanted = state.ring.submission().taskrun();
        if state.queued == 0 && !wanted {
            return;
        }
        // SAFETY: no argument but numbers.
        let result = unsafe { state.ring.submitter().enter::<()>(state.queued, 0, GET_EVENTS, None) };
        match result {
            Ok(count) => state.queued -= (count as u32).min(state.queued),
            // Interrupted, or short of memory: at the next turn.
            Err(error) => {
                let again = [libc::EINTR, libc::EAGAIN, libc::EBUSY].map(Some).contains(&error.raw_os_error());
                if !again {
                    self.outbox.error(error.raw_os_error().unwrap_or(libc::EIO));
                }
            }
        }
    }

    /// Look for operations that are over; how many.
    fn reap(&self, state: &mut State) -> usize {
        let mut count = 0;
        loop {
            let Some(entry) = state.ring.completion().next() else { break };
            count += 1;
            let index = entry.user_data() as u32;
            self.over(state, index, entry.result());
        }
        count
    }

    /// An operation is over: go on with its request, or end that.
    fn over(&self, state: &mut State, index: u32, result: i32) {
        let Some(slot) = state.slots[index as usize].as_mut() else { return };
        // Nobody waits for it any more, but for its end.
        let stale = slot.run != self.queue.run();
        let failure = match result {
            _ if stale => None,
            _ if [-libc::EINTR, -libc::EAGAIN].contains(&result) && slot.tries < TRIES => {
                slot.tries += 1;
                return self.push(state, index);
            }
            result if result < 0 => Some(-result),
            _ if slot.kind == Kind::Flush => None,
            result if (result as u64) < slot.bytes => {
                let moved = result as u64;
                if moved > 0 {
                    slot.bytes -= moved;
                    slot.offset += moved;
                    let all = if slot.left.is_empty() { &slot.data } else { &slot.left };
                    slot.left = rest(all, moved as usize);
                    return self.push(state, index);
                }
                if slot.kind == Kind::Read {
                    // Beyond the end of a file that is shorter than the disk.
                    clear(if slot.left.is_empty() { &slot.data } else { &slot.left });
                    None
                } else {
                    Some(libc::EIO)
                }
            }
            _ => None,
        };
        let status = match failure {
            None if stale => STATUS_IOERR,
            None => {
                let counter = match slot.kind {
                    Kind::Read => &self.counters.reads,
                    Kind::Write => &self.counters.writes,
                    Kind::Flush => &self.counters.flushes,
                };
                counter.fetch_add(1, Ordering::Relaxed);
                STATUS_OK
            }
            Some(errno) => {
                self.counters.io_errors.fetch_add(1, Ordering::Relaxed);
                self.outbox.error(errno);
                if slot.kind == Kind::Read && errno != libc::EFAULT {
                    // The used length covers it: nothing of it may be left as it was. What its driver took away is not
                    // filled: the zeroes that are in its place then would be memory of this process.
                    clear(&slot.data);
                }
                STATUS_IOERR
            }
        };
        // SAFETY: a byte of memory that the table keeps mapped.
        unsafe { std::sync::atomic::AtomicU8::from_ptr(slot.status) }.store(status, Ordering::Relaxed);
        if let Some(slot) = state.slots[index as usize].take() {
            state.done.push(slot);
            state.free.push(index);
            state.under_way -= 1;
        }
    }

    /// Give back what is finished.
    fn show(&self, state: &mut State) -> Shown {
        let mut after = Shown::default();
        if state.done.is_empty() {
            return after;
        }
        let mut stopped = None;
        {
            let mut current = self.queue.serve();
            let run = self.queue.run();
            if let Some(running) = current.as_mut() {
                let done = || state.done.iter().filter(|slot| slot.run == run);
                let ranges = done().flat_map(|slot| slot.ranges.iter().copied());
                match running.ring.complete_heads(done().map(|slot| (slot.head, slot.writable)), ranges) {
                    Ok(notify) => {
                        let (mut count, mut readable, mut written) = (0, 0, 0);
                        for slot in done() {
                            count += 1;
                            readable += slot.readable;
                            written += u64::from(slot.writable);
                        }
                        self.queue.count(count, readable, written);
                        after.notify = notify.then(|| running.signal.clone());
                    }
                    Err(violation) => {
                        after.fault = Some((run, Fault::of(0, &violation)));
                        stopped = current.take();
                    }
                }
            }
        }
        drop(stopped);
        state.done.iter_mut().for_each(|slot| slot.clear());
        state.spare.append(&mut state.done);
        self.tell(state.under_way);
        after
    }
}

/// What is wrong with a request that leaves nobody to answer (section 5.2.6).
fn fault(burst: &Burst, chain: usize) -> Option<Fault> {
    let readable = burst.readable_total(chain);
    if readable < HEADER as u64 {
        let detail = format!("{readable} readable bytes; a header is {HEADER}");
        return Some(Fault { queue: 0, name: "blk-header-short", detail });
    }
    if burst.writable_total(chain) == 0 {
        return Some(Fault { queue: 0, name: "blk-no-status", detail: "no writable byte for the status".into() });
    }
    None
}

/// The `size` bytes of pieces behind the first `skip`.
fn gather(pieces: &[Piece], mut skip: u64, mut size: u64, into: &mut Vec<libc::iovec>) {
    for piece in pieces {
        let bytes = piece.size() as u64;
        if skip >= bytes {
            skip -= bytes;
            continue;
        }
        let count = (bytes - skip).min(size);
        if count == 0 {
            return;
        }
        // SAFETY: inside the piece.
        let base = unsafe { piece.as_ptr().add(skip as usize) };
        into.push(libc::iovec { iov_base: base.cast(), iov_len: count as usize });
        size -= count;
        skip = 0;
    }
}

/// All but the first `skip` bytes.
fn rest(parts: &[libc::iovec], mut skip: usize) -> Vec<libc::iovec> {
    let mut rest = Vec::with_capacity(parts.len());
    for part in parts {
        if skip >= part.iov_len {
            skip -= part.iov_len;
            continue;
        }
        // SAFETY: inside the part.
        let base = unsafe { part.iov_base.cast::<u8>().add(skip) };
        rest.push(libc::iovec { iov_base: base.cast(), iov_len: part.iov_len - skip });
        skip = 0;
    }
    rest
}

/// Fill with zeroes.
fn clear(parts: &[libc::iovec]) {
    for part in parts {
        // SAFETY: mapped memory that the device may write, which a slot's table keeps.
        unsafe { std::ptr::write_bytes(part.iov_base.cast::<u8>(), 0, part.iov_len) };
    }
}

impl Engine for Blk {
    fn begin(&self) -> Option<RawFd> {
        let mut state = self.lock();
        let ring = &state.as_mut()?.ring;
        if let Err(error) = ring.submitter().register_enable_rings() {
            self.failed(&error.to_string());
        }
        // Older systems have no word for it (before Linux 5.15): there a disk that hangs may hold its neighbours.
        let _ = ring.submitter().register_iowq_max_workers(&mut [BLOCKED, 0]);
        Some(ring.as_raw_fd())
    }

    fn turn(&self, ask: bool) -> Turn {
        let mut turn = Turn::default();
        let mut guard = self.lock();
        let Some(state) = guard.as_mut() else { return turn };
        for _ in 0..BUDGET {
            let mut over = self.reap(state);
            let starved = state.free.is_empty();
            let (taken, heavy) = self.take(state, ask);
            self.submit(state);
            over += self.reap(state);
            let Shown { notify: signal, fault: lost } = self.show(state);
            if let Some(signal) = signal {
                signal.notify();
            }
            if let Some((run, fault)) = lost {
                self.outbox.fault(run, fault);
            }
            if state.under_way == 0 {
                if let Some((run, fault)) = state.fault.as_mut().and_then(|(run, fault)| Some((*run, fault.take()?))) {
                    // The device model stops the queue, behind requests that it has to answer itself.
                    self.outbox.fault(run, fault);
                }
            }
            turn.worked |= taken + over > 0;
            // What is under way tells by its descriptor, and the ring tells when a look has found nothing.
            turn.more = (taken > 0 && (ask || taken == BATCH)) || state.queued > 0 || (starved && over > 0);
            if !turn.more || heavy {
                break;
            }
        }
        turn.watch = state.under_way > 0;
        turn
    }

    fn end(&self) -> bool {
        let Some(mut state) = self.lock().take() else { return true };
        let over = state.under_way == 0;
        if state.under_way > 0 {
            // The kernel may still write there: it stays mapped for good. The file is let go of when it does no more.
            std::mem::forget(std::mem::take(&mut state.slots));
        } else {
            // At once, and so its lock: the ring goes later, and in its own time.
            let _ = state.ring.submitter().unregister_files();
        }
        self.tell(0);
        over
    }

    fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { reads, writes, flushes, io_errors } = &self.counters;
        let all = [("reads", reads), ("writes", writes), ("flushes", flushes), ("io_errors", io_errors)];
        all.map(|(name, counter)| (name, counter.load(Ordering::Relaxed))).to_vec()
    }

    fn settle(&self, timeout: Duration) -> bool {
        self.wait(timeout)
    }

    fn failed(&self, reason: &str) {
        self.outbox.fault(self.queue.fail(), Fault { queue: 0, name: "engine-error", detail: reason.to_owned() });
    }
}
