//! Workers: native threads that give engines their turns.
//!
//! An engine is ready when it is marked, when a doorbell of its queues rings, or when its descriptor is readable:
//!
//! ```text
//!  Task::mark ── inbox ──┐
//!  doorbells ── epoll ───┼─> ready, by priority ─> turn ─> more work: ready again, behind its equals
//!  its descriptor ───────┘                          └────> polled, while it pays; else it asks to be notified
//! ```
//!
//! What is urgent goes first, after each turn; a turn is limited by its engine, and equals take turns. A worker that
//! polls looks at an engine again and again instead of having it ask for notifications. How long it does is learned from
//! the load (adaptive): the window grows when the next request came soon after the worker had given up, and shrinks when
//! it did not.
//!
//! Nothing is called with a lock held. Descriptors are watched edge by edge: so a doorbell need not be read to be heard
//! again, and whoever wants to know how often it was rung may read it, and marks the task then.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{fence, AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vbus_ring::doorbell::Doorbell;
use vbus_ring::signal::Route;

use crate::outbox::Outbox;

/// Priorities: 0 is the most urgent.
pub const PRIORITIES: usize = 8;
/// Turns in a row without a look at the descriptors of others, and how long they may take together.
const TURNS: u32 = 8;
const UNSEEN: Duration = Duration::from_micros(50);
/// The same, of turns that found nothing.
const IDLE_TURNS: u32 = 64;
/// Descriptors looked at in one go.
const BATCH: usize = 64;
/// The longest and the shortest time to poll after the last request, when that is learned.
const LONGEST: Duration = Duration::from_micros(200);
const SHORTEST: Duration = Duration::from_micros(4);
/// The token of the worker's own eventfd.
const WAKE: u64 = 0;
/// In a token: it is the engine's descriptor, and none of its doorbells.
const DESCRIPTOR: u64 = 1;

/// What came of a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Whether there was anything to do.
    pub worked: bool,
    /// Whether there may be more, which nobody will tell of.
    pub more: bool,
    /// Whether its descriptor will tell of something.
    pub watch: bool,
}

/// What a worker runs.
pub trait Engine: Send + Sync {
    /// The worker's thread has it from now on; gives what becomes readable when it wants a turn, if that is a descriptor.
    fn begin(&self) -> Option<RawFd> {
        None
    }

    /// Serve what there is, within a budget. With `ask`, a turn that leaves no more has asked for notifications;
    /// without, somebody looks again.
    fn turn(&self, ask: bool) -> Turn;

    /// The worker's thread has it no more. False when the system still does something for it, and the thread cannot end
    /// before that does.
    fn end(&self) -> bool {
        true
    }

    /// Wait until nothing is under way in the memory of its queues, which were stopped; false when that takes longer.
    fn settle(&self, _timeout: Duration) -> bool {
        true
    }

    /// The driver is gone: what waits for it must not reach the next one, nor the device model.
    fn forget(&self) {
        self.outbox().forget();
    }

    /// What its device model hears of.
    fn outbox(&self) -> &Outbox;

    /// What it counted, by name.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// A turn panicked, which is a defect: there are no more turns, and `end` is next.
    fn failed(&self, reason: &str);
}

/// Whether a worker sleeps when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// At once.
    Notified,
    /// After a time in which more is likely to come.
    Adaptive,
    /// Never.
    Always,
}

/// An engine at its worker.
pub struct Task {
    id: u64,
    engine: Arc<dyn Engine>,
    priority: AtomicU32,
    worker: Arc<Shared>,
    ready: AtomicBool,
    gone: AtomicBool,
    /// The doorbells that it listens to.
    bells: Mutex<Vec<Arc<Doorbell>>>,
    /// The worker's own: whether it is polled, until when without a request (nanoseconds), and when the last one came.
    polled: AtomicBool,
    window: AtomicU64,
    last: AtomicU64,
    /// As above: the engine's descriptor, or -1, and whether it is looked at.
    fd: AtomicI32,
    watched: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    /// Give the engine a turn soon. From any thread; under locks of others.
    pub fn mark(self: &Arc<Self>) {
        if self.ready.swap(true, Ordering::AcqRel) {
            return;
        }
        lock(&self.worker.inbox).ready.push(self.clone());
        self.worker.call();
    }

    /// Be this urgent from the next turn on.
    pub fn set_priority(self: &Arc<Self>, priority: u32) {
        self.priority.store(priority.min(PRIORITIES as u32 - 1), Ordering::Relaxed);
        lock(&self.worker.inbox).moved.push(self.clone());
        self.worker.call();
    }

    fn priority(&self) -> usize {
        self.priority.load(Ordering::Relaxed) as usize
    }

    /// Have a turn whenever this doorbell rings.
    pub fn listen(&self, bell: &Arc<Doorbell>) -> io::Result<()> {
        let mut bells = lock(&self.bells);
        self.worker.watch(bell.as_raw_fd(), libc::EPOLLIN | libc::EPOLLET, self.id)?;
        bells.push(bell.clone());
        Ok(())
    }

    /// Listen to it no more.
    pub fn ignore(&self, bell: &Arc<Doorbell>) {
        let mut bells = lock(&self.bells);
        if let Some(index) = bells.iter().position(|known| Arc::ptr_eq(known, bell)) {
            self.worker.unwatch(bell.as_raw_fd());
            bells.swap_remove(index);
        }
    }

    /// Take the engine from its worker: when this returns it has no turn any more.
    pub fn remove(self: &Arc<Self>) {
        for bell in lock(&self.bells).drain(..) {
            self.worker.unwatch(bell.as_raw_fd());
        }
        let parting = Arc::new(Parting::default());
        lock(&self.worker.inbox).removed.push((self.clone(), parting.clone()));
        self.worker.call();
        parting.wait(&self.worker);
    }
}

/// Marks of a scheduler's key are for a task.
pub struct ToTask(pub Arc<Task>);

impl Route for ToTask {
    fn call(&self) {
        self.0.mark();
    }
}

#[derive(Default)]
struct Parting {
    over: Mutex<bool>,
    changed: Condvar,
}

impl Parting {
    fn wait(&self, worker: &Shared) {
        let mut over = lock(&self.over);
        // A worker that has ended has ended its engines.
        while !*over && !worker.ended.load(Ordering::Acquire) {
            let (guard, _) =
                self.changed.wait_timeout(over, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner);
            over = guard;
        }
    }

    fn end(&self) {
        *lock(&self.over) = true;
        self.changed.notify_all();
    }
}

#[derive(Default)]
struct Inbox {
    ready: Vec<Arc<Task>>,
    added: Vec<Arc<Task>>,
    /// Those whose priority has changed.
    moved: Vec<Arc<Task>>,
    removed: Vec<(Arc<Task>, Arc<Parting>)>,
}

/// What a worker's thread and others know of each other.
struct Shared {
    epoll: OwnedFd,
    wake: OwnedFd,
    polling: Polling,
    inbox: Mutex<Inbox>,
    /// Whether there is something in it.
    called: AtomicBool,
    asleep: AtomicBool,
    closed: AtomicBool,
    ended: AtomicBool,
    tasks: Mutex<HashMap<u64, Arc<Task>>>,
    last_id: AtomicU64,
    turns: AtomicU64,
    idle_turns: AtomicU64,
    sleeps: AtomicU64,
    busy: AtomicU64,
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made by the caller, and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Shared {
    fn new(polling: Polling) -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: no pointers are involved.
        let wake = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let shared = Self {
            epoll,
            wake,
            polling,
            inbox: Mutex::default(),
            called: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            tasks: Mutex::default(),
            last_id: AtomicU64::new(WAKE),
            turns: AtomicU64::new(0),
            idle_turns: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            busy: AtomicU64::new(0),
        };
        shared.watch(shared.wake.as_raw_fd(), libc::EPOLLIN | libc::EPOLLET, WAKE)?;
        Ok(shared)
    }

    fn watch(&self, fd: RawFd, events: libc::c_int, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, events, token)
    }

    fn control(&self, operation: libc::c_int, fd: RawFd, events: libc::c_int, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: the event outlives the call; bad descriptors give errors.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn unwatch(&self, fd: RawFd) {
        // SAFETY: takes no event.
        unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// There is something in the inbox.
    fn call(&self) {
        self.called.store(true, Ordering::Release);
        // Either the worker sees that it was called, or this sees that it sleeps: see `sleep`.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight bytes are read from `one`; the eventfd is our own and does not block.
            unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }
}

/// A thread that gives engines their turns.
pub struct Worker {
    shared: Arc<Shared>,
    /// And whether it can end, which it says at its end.
    thread: Mutex<Option<(JoinHandle<()>, Receiver<bool>)>>,
}

impl Worker {
    /// Start one, on these CPUs or on any.
    pub fn start(name: &str, polling: Polling, cpus: &[usize]) -> io::Result<Self> {
        Self::start_nice(name, polling, cpus, 0)
    }

    /// As `start`, with a nice value for the system's scheduler, where that is permitted.
    pub fn start_nice(name: &str, polling: Polling, cpus: &[usize], nice: i32) -> io::Result<Self> {
        let set = cpu_set(cpus)?;
        let shared = Arc::new(Shared::new(polling)?);
        let (theirs, told, ended) = (shared.clone(), channel(), channel());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let begun = prepare(set.as_ref());
            if nice != 0 {
                // SAFETY: it takes numbers alone. 0: this thread; who is not permitted goes on as he is.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
            }
            let failed = begun.is_err();
            // The other end waits for it.
            let _ = told.0.send(begun);
            if !failed {
                let _ = ended.0.send(Local::new(theirs).run());
            }
        })?;
        told.1.recv().map_err(|_| io::Error::other("the worker did not begin"))??;
        Ok(Self { shared, thread: Mutex::new(Some((thread, ended.1))) })
    }

    /// Give an engine its turns from now on; the first soon.
    pub fn add(&self, engine: Arc<dyn Engine>, priority: u32) -> Arc<Task> {
        let id = self.shared.last_id.fetch_add(2, Ordering::Relaxed) + 2;
        let task = Arc::new(Task {
            id,
            engine,
            priority: AtomicU32::new(priority.min(PRIORITIES as u32 - 1)),
            worker: self.shared.clone(),
            ready: AtomicBool::new(true),
            gone: AtomicBool::new(false),
            bells: Mutex::default(),
            polled: AtomicBool::new(false),
            window: AtomicU64::new(0),
            last: AtomicU64::new(0),
            fd: AtomicI32::new(-1),
            watched: AtomicBool::new(false),
        });
        lock(&self.shared.tasks).insert(id, task.clone());
        lock(&self.shared.inbox).added.push(task.clone());
        self.shared.call();
        task
    }

    /// How many engines it has.
    pub fn tasks(&self) -> usize {
        lock(&self.shared.tasks).len()
    }

    /// Turns that had work, turns that had none, how often it slept, and nanoseconds spent in turns that had work.
    pub fn counters(&self) -> [u64; 4] {
        let Shared { turns, idle_turns, sleeps, busy, .. } = &*self.shared;
        [turns, idle_turns, sleeps, busy].map(|counter| counter.load(Ordering::Relaxed))
    }

    /// End it, and its engines.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.call();
        if let Some((thread, ended)) = lock(&self.thread).take() {
            // One that cannot end is left behind, with nothing but its end to come. (It is an error that it panicked.)
            if ended.recv() != Ok(false) {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.close();
    }
}

fn cpu_set(cpus: &[usize]) -> io::Result<Option<libc::cpu_set_t>> {
    if cpus.is_empty() {
        return Ok(None);
    }
    // SAFETY: a set of zeroes is an empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        if cpu >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the number is below the set's size.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    Ok(Some(set))
}

/// In the worker's thread: go to its CPUs, and leave signals to those who wait for them.
fn prepare(cpus: Option<&libc::cpu_set_t>) -> io::Result<()> {
    if let Some(set) = cpus {
        // SAFETY: the set is valid, and as large as is said.
        if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), set) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: a set that is filled in by the call after; faults are not among those that are blocked.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut signals);
        for fault in [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT] {
            libc::sigdelset(&mut signals, fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
    }
    Ok(())
}

/// What is the thread's own.
struct Local {
    shared: Arc<Shared>,
    ready: [VecDeque<Arc<Task>>; PRIORITIES],
    polled: [Vec<Arc<Task>>; PRIORITIES],
    /// Which of those that are polled is next.
    next: [usize; PRIORITIES],
    /// Of each priority: whether the next turn is first offered to those that are polled.
    polled_first: [bool; PRIORITIES],
    began: Instant,
    /// What the clock said after the last turn, or sleep.
    clock: u64,
    /// The last look at descriptors (nanoseconds), and turns since.
    looked: u64,
    turns: u32,
    idle_turns: u32,
    can_end: bool,
}

impl Local {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            ready: Default::default(),
            polled: Default::default(),
            next: [0; PRIORITIES],
            polled_first: [false; PRIORITIES],
            began: Instant::now(),
            clock: 0,
            looked: 0,
            turns: 0,
            idle_turns: 0,
            can_end: true,
        }
    }

    /// Until the worker is closed; false when this thread cannot end.
    fn run(mut self) -> bool {
        while !self.shared.closed.load(Ordering::Acquire) {
            if self.shared.called.load(Ordering::Relaxed) {
                self.read_inbox();
            }
            if self.step() {
                self.turns += 1;
                if self.turns >= TURNS || self.clock.saturating_sub(self.looked) >= UNSEEN.as_nanos() as u64 {
                    self.look(0);
                }
                continue;
            }
            if self.give_up() {
                self.sleep();
                continue;
            }
            self.idle_turns += 1;
            if self.idle_turns >= IDLE_TURNS {
                self.look(0);
            }
            std::hint::spin_loop();
        }
        self.read_inbox();
        let tasks: Vec<Arc<Task>> = lock(&self.shared.tasks).values().cloned().collect();
        for task in tasks {
            self.part(&task);
        }
        self.shared.ended.store(true, Ordering::Release);
        self.can_end
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn read_inbox(&mut self) {
        // Cleared first: what comes after is seen at the next look.
        self.shared.called.swap(false, Ordering::AcqRel);
        let Inbox { ready, added, moved, removed } = std::mem::take(&mut *lock(&self.shared.inbox));
        for task in added {
            if let Some(fd) = task.engine.begin() {
                // Not looked at, until a turn asks for it.
                let watched = self.shared.watch(fd, libc::EPOLLONESHOT, task.id | DESCRIPTOR);
                task.fd.store(fd, Ordering::Relaxed);
                if let Err(error) = watched {
                    task.engine.failed(&format!("its descriptor cannot be watched: {error}"));
                }
            }
            if self.shared.polling == Polling::Always {
                self.poll(&task);
            }
            self.ready[task.priority()].push_back(task);
        }
        for task in ready {
            self.ready[task.priority()].push_back(task);
        }
        for task in moved {
            self.change_place(&task);
        }
        for (task, parting) in removed {
            self.part(&task);
            parting.end();
        }
    }

    fn part(&mut self, task: &Arc<Task>) {
        if task.gone.swap(true, Ordering::Relaxed) {
            return;
        }
        self.forget(task);
        let fd = task.fd.swap(-1, Ordering::Relaxed);
        if fd >= 0 {
            self.shared.unwatch(fd);
        }
        lock(&self.shared.tasks).remove(&task.id);
        self.can_end &= task.engine.end();
    }

    /// Look at it no more.
    fn forget(&mut self, task: &Arc<Task>) {
        task.polled.store(false, Ordering::Relaxed);
        for tasks in &mut self.polled {
            tasks.retain(|other| !Arc::ptr_eq(other, task));
        }
    }

    /// Have it among those of its priority, where it waits or is looked at.
    fn change_place(&mut self, task: &Arc<Task>) {
        for tasks in &mut self.ready {
            let before = tasks.len();
            tasks.retain(|other| !Arc::ptr_eq(other, task));
            if tasks.len() < before {
                self.ready[task.priority()].push_back(task.clone());
                break;
            }
        }
        if task.polled.load(Ordering::Relaxed) {
            self.forget(task);
            self.poll(task);
        }
    }

    fn poll(&mut self, task: &Arc<Task>) {
        if !task.polled.swap(true, Ordering::Relaxed) {
            self.polled[task.priority()].push(task.clone());
        }
    }

    /// Give the most urgent that has something to do a turn; false when none has.
    fn step(&mut self) -> bool {
        for priority in 0..PRIORITIES {
            // The marked and the polled take turns, so that whoever is marked without end keeps nobody waiting.
            let polled_first = std::mem::take(&mut self.polled_first[priority]);
            if polled_first && self.serve_polled(priority) {
                return true;
            }
            while let Some(task) = self.ready[priority].pop_front() {
                // Before its turn: a mark from now on is for another.
                task.ready.swap(false, Ordering::AcqRel);
                // What is polled is looked at anyway.
                if !task.gone.load(Ordering::Relaxed) && !task.polled.load(Ordering::Relaxed) {
                    self.serve_ready(&task);
                    // One that is polled from now on has had its turn.
                    self.polled_first[priority] = !task.polled.load(Ordering::Relaxed);
                    return true;
                }
            }
            if !polled_first && self.serve_polled(priority) {
                return true;
            }
        }
        false
    }

    /// Give the next of those that are polled and have something to do a turn; false when none has.
    fn serve_polled(&mut self, priority: usize) -> bool {
        let count = self.polled[priority].len();
        for index in 0..count {
            let place = (self.next[priority] + index) % count;
            let Some(task) = self.polled[priority].get(place).cloned() else { break };
            if self.turn(&task, false).worked {
                task.last.store(self.clock, Ordering::Relaxed);
                self.next[priority] = (place + 1) % count;
                return true;
            }
        }
        false
    }

    fn serve_ready(&mut self, task: &Arc<Task>) {
        let ask = match self.shared.polling {
            Polling::Notified => true,
            Polling::Always => false,
            Polling::Adaptive => {
                self.learn(task);
                task.window.load(Ordering::Relaxed) == 0
            }
        };
        let turn = self.turn(task, ask);
        if turn.worked && self.shared.polling == Polling::Adaptive {
            task.last.store(self.clock, Ordering::Relaxed);
        }
        if task.gone.load(Ordering::Relaxed) {
            return;
        }
        if !ask {
            self.poll(task);
        } else if turn.more && !task.ready.swap(true, Ordering::AcqRel) {
            self.ready[task.priority()].push_back(task.clone());
        }
    }

    /// It was notified: how long since its last request? Would it have paid to wait for that?
    fn learn(&self, task: &Task) {
        let gap = self.clock.saturating_sub(task.last.load(Ordering::Relaxed));
        let window = task.window.load(Ordering::Relaxed);
        let (shortest, longest) = (SHORTEST.as_nanos() as u64, LONGEST.as_nanos() as u64);
        let window = if gap <= longest { (window * 2).clamp(shortest, longest) } else { window / 2 };
        task.window.store(if window < shortest { 0 } else { window }, Ordering::Relaxed);
    }

    fn turn(&mut self, task: &Arc<Task>, ask: bool) -> Turn {
        let turn = catch_unwind(AssertUnwindSafe(|| task.engine.turn(ask))).unwrap_or_else(|cause| {
            let text = cause.downcast_ref::<String>().map(String::as_str);
            task.engine.failed(text.or(cause.downcast_ref::<&str>().copied()).unwrap_or("it panicked"));
            self.part(task);
            Turn::default()
        });
        if ask && turn.watch && !task.watched.swap(true, Ordering::Relaxed) {
            let (events, fd) = (libc::EPOLLIN | libc::EPOLLONESHOT, task.fd.load(Ordering::Relaxed));
            // It is there, as long as the task is.
            let _ = self.shared.control(libc::EPOLL_CTL_MOD, fd, events, task.id | DESCRIPTOR);
        }
        // Once a turn: who polls has nothing else that would tell how busy it is.
        let now = self.now();
        let taken = now - std::mem::replace(&mut self.clock, now);
        // Nobody else counts.
        let add = |counter: &AtomicU64, more| counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        if turn.worked {
            add(&self.shared.turns, 1);
            add(&self.shared.busy, taken);
        } else {
            add(&self.shared.idle_turns, 1);
        }
        turn
    }

    /// There was nothing to do: have those ask for notifications that were waited for long enough. True when none is
    /// left to look at.
    fn give_up(&mut self) -> bool {
        if self.shared.polling == Polling::Always {
            return self.polled.iter().all(Vec::is_empty);
        }
        let mut left = false;
        for priority in 0..PRIORITIES {
            if self.polled[priority].is_empty() {
                continue;
            }
            let now = self.clock;
            for task in self.polled[priority].clone() {
                let waited = now.saturating_sub(task.last.load(Ordering::Relaxed));
                if waited > task.window.load(Ordering::Relaxed) {
                    let turn = self.turn(&task, true);
                    if !turn.worked && !turn.more {
                        self.forget(&task);
                        continue;
                    }
                    task.last.store(now, Ordering::Relaxed);
                }
                left = true;
            }
        }
        !left
    }

    fn sleep(&mut self) {
        self.shared.asleep.store(true, Ordering::Relaxed);
        // Either whoever calls sees that we sleep, or we see the call: see `Shared::call`.
        fence(Ordering::SeqCst);
        if !self.shared.called.load(Ordering::Relaxed) {
            self.shared.sleeps.store(self.shared.sleeps.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            self.look(-1);
            self.clock = self.now();
        }
        self.shared.asleep.store(false, Ordering::Relaxed);
    }

    /// What descriptors say, after so many milliseconds at most.
    fn look(&mut self, milliseconds: i32) {
        (self.turns, self.idle_turns) = (0, 0);
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let epoll = self.shared.epoll.as_raw_fd();
        // SAFETY: the array outlives the call and has room for BATCH events.
        let found = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), BATCH as i32, milliseconds) };
        self.looked = self.now();
        if found <= 0 {
            return;
        }
        let tasks = lock(&self.shared.tasks);
        for event in &events[..found as usize] {
            // Not that of the worker itself, nor of one that was removed meanwhile.
            let token = event.u64;
            if let Some(task) = tasks.get(&(token & !DESCRIPTOR)) {
                if token & DESCRIPTOR != 0 {
                    task.watched.store(false, Ordering::Relaxed);
                }
                if !task.ready.swap(true, Ordering::AcqRel) {
                    self.ready[task.priority()].push_back(task.clone());
                }
            }
        }
    }
}
