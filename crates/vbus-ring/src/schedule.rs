//! Which thread works on what next: ready keys, most urgent first, one turn an actor at a time.
//!
//! A key is what a thread is handed: a queue of a device, a socket, a timer. It belongs to an actor (a device, a
//! connector), and no two threads ever hold keys of one actor. A key becomes ready when it is marked, when a descriptor
//! of its is readable, or when an event of its source is taken from an event ring:
//!
//! ```text
//!  mark(key) ───────────────────────────┐
//!  epoll: descriptors, once a turn ─────┼─> actor's ready keys ─> best key of each free actor ─> next()
//!  event rings, drained on every call ──┘    (priority, order)        (priority, order)
//! ```
//!
//! Threads that find nothing wait. One of them leads: it puts the event rings to sleep, looks once more, and waits in
//! epoll; the others follow on a condition variable. Whoever leaves with a key sees to it that somebody leads, and that
//! another one comes when more is ready. All costs are logarithmic in the number of ready actors: nothing here walks
//! over all keys. The number of receivers (connections) is walked on every call.
//!
//! Locks are taken in the order state, receiver; nothing but a route is called back under them, and no lock is held while waiting.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::doorbell::Doorbell;
use crate::event::{Consumer, Counters, MAX_PRIORITIES};
use crate::mem::Window;
use crate::signal::{Notify, Route};

/// Events taken from one receiver in one go: a flood of one connection must not hold up the others.
const BUDGET: usize = 256;
/// Descriptors looked at in one go.
const BATCH: usize = 128;
/// The token of the scheduler's own eventfd.
const KICK: u64 = 0;

/// A caller's mistake, or the system's refusal.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// No such actor.
    #[error("no actor {0}")]
    Actor(u64),
    /// No such key.
    #[error("no key {0}")]
    Key(u64),
    /// Priorities are 0 to 7.
    #[error("priority {0} is out of range: 0 is the most urgent of 8")]
    Priority(u32),
    /// `done` without a turn.
    #[error("no turn of key {1} of actor {0} is running")]
    NoTurn(u64, u64),
    /// A receiver belongs to one scheduler at a time.
    #[error("the receiver belongs to a scheduler already")]
    Attached,
    /// The system refused.
    #[error(transparent)]
    Os(#[from] io::Error),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An event consumer that threads share.
pub struct Receiver {
    consumer: Mutex<Consumer<Window>>,
    attached: AtomicBool,
}

impl Receiver {
    /// Share a consumer.
    pub fn new(consumer: Consumer<Window>) -> Self {
        Self { consumer: Mutex::new(consumer), attached: AtomicBool::new(false) }
    }

    /// The consumer, for as long as the guard lives. Not to be held while waiting.
    pub fn consumer(&self) -> MutexGuard<'_, Consumer<Window>> {
        lock(&self.consumer)
    }
}

/// (priority, order of becoming ready, key): sorts as it is to be handed out.
type Entry = (u32, u64, u64);

#[derive(Default)]
struct Actor {
    running: Option<u64>,
    keys: HashSet<u64>,
    ready: BTreeSet<Entry>,
    /// Its entry among all actors' best.
    listed: Option<Entry>,
}

struct Key {
    actor: u64,
    priority: u32,
    queued: Option<Entry>,
    /// Marked while its own turn runs.
    marked: bool,
    /// Who is called instead.
    route: Option<Arc<dyn Route>>,
    fds: HashSet<RawFd>,
    /// Tokens of its descriptors that fired: not looked at until its turn is done.
    fired: Vec<u64>,
}

enum Watch {
    Fd(RawFd, u64),
    Bell(Arc<Doorbell>),
}

struct Attached {
    receiver: Arc<Receiver>,
    bells: Vec<u64>,
    fault_key: u64,
    faulted: bool,
}

#[derive(Default)]
struct State {
    last_id: u64,
    last_order: u64,
    actors: HashMap<u64, Actor>,
    keys: HashMap<u64, Key>,
    /// The best ready key of each actor that has no turn running.
    ready: BTreeSet<Entry>,
    fds: HashMap<RawFd, u64>,
    watches: HashMap<u64, Watch>,
    receivers: Vec<Attached>,
    followers: usize,
    leading: bool,
    kicked: bool,
    closed: bool,
    /// Kept for its allocation.
    keys_taken: Vec<u64>,
}

/// Hands ready keys to threads.
pub struct Scheduler {
    state: Mutex<State>,
    followers: Condvar,
    epoll: OwnedFd,
    kick: OwnedFd,
}

type Events = [libc::epoll_event; BATCH];

impl Scheduler {
    /// A scheduler without actors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: no pointers are involved.
        let kick = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let scheduler = Self { state: Mutex::default(), followers: Condvar::new(), epoll, kick };
        scheduler.control(libc::EPOLL_CTL_ADD, scheduler.kick.as_raw_fd(), libc::EPOLLIN, KICK)?;
        Ok(scheduler)
    }

    fn control(&self, operation: libc::c_int, fd: RawFd, events: libc::c_int, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: the event outlives the call; bad descriptors give errors.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A new actor.
    pub fn actor(&self) -> u64 {
        let mut state = lock(&self.state);
        let id = state.id();
        state.actors.insert(id, Actor::default());
        id
    }

    /// A new key of an actor; priority 0 is the most urgent of 8.
    pub fn key(&self, actor: u64, priority: u32) -> Result<u64, ScheduleError> {
        if priority >= MAX_PRIORITIES {
            return Err(ScheduleError::Priority(priority));
        }
        let mut state = lock(&self.state);
        let id = state.id();
        state.actors.get_mut(&actor).ok_or(ScheduleError::Actor(actor))?.keys.insert(id);
        let key =
            Key { actor, priority, queued: None, marked: false, route: None, fds: HashSet::new(), fired: Vec::new() };
        state.keys.insert(id, key);
        Ok(id)
    }

    /// Forget a key and its descriptors. Its turn, if one runs, still ends with `done`.
    pub fn drop_key(&self, key: u64) {
        self.forget(&mut lock(&self.state), key);
    }

    /// Forget an actor and all its keys.
    pub fn drop_actor(&self, actor: u64) {
        let mut state = lock(&self.state);
        let keys = state.actors.get_mut(&actor).map(|actor| std::mem::take(&mut actor.keys));
        for key in keys.unwrap_or_default() {
            self.forget(&mut state, key);
        }
        state.actors.remove(&actor);
    }

    fn forget(&self, state: &mut State, key: u64) {
        let Some(gone) = state.keys.remove(&key) else { return };
        for fd in gone.fds {
            self.unwatch(state, fd);
        }
        if let Some(actor) = state.actors.get_mut(&gone.actor) {
            actor.keys.remove(&key);
            if let Some(entry) = gone.queued {
                actor.ready.remove(&entry);
            }
            state.list(gone.actor);
        }
    }

    /// Make a key ready. Unknown keys are ignored: theirs was dropped while the mark was under way.
    /// True when the key was not ready before.
    pub fn mark(&self, key: u64) -> bool {
        let mut state = lock(&self.state);
        match state.mark(key) {
            Mark::Known => false,
            Mark::Waits => true,
            Mark::Listed => {
                self.rouse(&mut state);
                true
            }
        }
    }

    /// From now on, whatever marks the key calls this instead, or makes it ready again. Unknown keys are ignored.
    pub fn route(&self, key: u64, route: Option<Arc<dyn Route>>) {
        let old = lock(&self.state).keys.get_mut(&key).map(|key| std::mem::replace(&mut key.route, route));
        drop(old);
    }

    /// Readable (or hung up) marks `key`; looked at again after the key's turn. Replaces an earlier use of `fd`.
    pub fn add_fd(&self, fd: RawFd, key: u64) -> Result<(), ScheduleError> {
        let mut state = lock(&self.state);
        if !state.keys.contains_key(&key) {
            return Err(ScheduleError::Key(key));
        }
        self.unwatch(&mut state, fd);
        let token = state.id();
        let events = libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLONESHOT;
        match self.control(libc::EPOLL_CTL_ADD, fd, events, token) {
            // Known under this number although it was not ours any more: take it over.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                self.control(libc::EPOLL_CTL_MOD, fd, events, token)?;
            }
            result => result?,
        }
        state.fds.insert(fd, token);
        state.watches.insert(token, Watch::Fd(fd, key));
        if let Some(key) = state.keys.get_mut(&key) {
            key.fds.insert(fd);
        }
        Ok(())
    }

    /// Stop looking at `fd`. A closed or unknown one is no error.
    pub fn remove_fd(&self, fd: RawFd) {
        self.unwatch(&mut lock(&self.state), fd);
    }

    fn unwatch(&self, state: &mut State, fd: RawFd) {
        if let Some(token) = state.fds.remove(&fd) {
            if let Some(Watch::Fd(_, key)) = state.watches.remove(&token) {
                if let Some(key) = state.keys.get_mut(&key) {
                    key.fds.remove(&fd);
                }
            }
            // Closed already: epoll has forgotten it by itself.
            let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
        }
    }

    /// Drain `receiver` from now on, woken by `bells`; its fault marks `fault_key`.
    pub fn add_events(
        &self,
        receiver: &Arc<Receiver>,
        bells: &[Arc<Doorbell>],
        fault_key: u64,
    ) -> Result<(), ScheduleError> {
        let mut state = lock(&self.state);
        if !state.keys.contains_key(&fault_key) {
            return Err(ScheduleError::Key(fault_key));
        }
        if receiver.attached.swap(true, Ordering::AcqRel) {
            return Err(ScheduleError::Attached);
        }
        let mut tokens = Vec::new();
        let mut seen = HashSet::new();
        for bell in bells.iter().filter(|bell| seen.insert(bell.as_raw_fd())) {
            let token = state.id();
            if let Err(error) = self.control(libc::EPOLL_CTL_ADD, bell.as_raw_fd(), libc::EPOLLIN, token) {
                self.unring(&mut state, &tokens);
                receiver.attached.store(false, Ordering::Release);
                return Err(error.into());
            }
            state.watches.insert(token, Watch::Bell(bell.clone()));
            tokens.push(token);
        }
        state.receivers.push(Attached { receiver: receiver.clone(), bells: tokens, fault_key, faulted: false });
        // A leader that waits did not put this receiver to sleep: it must look again.
        self.kick(&mut state);
        Ok(())
    }

    /// Stop draining `receiver`.
    pub fn remove_events(&self, receiver: &Arc<Receiver>) {
        let mut state = lock(&self.state);
        if let Some(index) = state.receivers.iter().position(|other| Arc::ptr_eq(&other.receiver, receiver)) {
            let attached = state.receivers.remove(index);
            self.unring(&mut state, &attached.bells);
            attached.receiver.consumer().wake();
            attached.receiver.attached.store(false, Ordering::Release);
        }
    }

    fn unring(&self, state: &mut State, tokens: &[u64]) {
        for token in tokens {
            // The descriptor is the doorbell's own and still open, so it is this file that epoll forgets.
            if let Some(Watch::Bell(bell)) = state.watches.remove(token) {
                let _ = self.control(libc::EPOLL_CTL_DEL, bell.as_raw_fd(), 0, 0);
            }
        }
    }

    /// The next turn: (actor, key). None when `timeout` passed or the scheduler was closed.
    pub fn next(&self, timeout: Option<Duration>) -> Option<(u64, u64)> {
        self.wait(lock(&self.state), timeout)
    }

    /// `done`, then `next`, by a thread that goes on: it wakes no other for what it takes itself.
    pub fn go_on(
        &self,
        actor: u64,
        key: u64,
        again: bool,
        timeout: Option<Duration>,
    ) -> Result<Option<(u64, u64)>, ScheduleError> {
        let mut state = lock(&self.state);
        self.end(&mut state, actor, key, again)?;
        Ok(self.wait(state, timeout))
    }

    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>, timeout: Option<Duration>) -> Option<(u64, u64)> {
        // A timeout beyond the clock's range is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut events: Events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let turn = loop {
            if state.closed {
                break None;
            }
            self.drain(&mut state);
            if !state.leading {
                let found = self.poll(&mut events, 0);
                self.found(&mut state, &events[..found]);
            }
            if let Some(turn) = state.take() {
                break Some(turn);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                break None;
            }
            state = if state.leading { self.follow(state, left) } else { self.lead(state, left, &mut events) };
        };
        // Somebody must lead; and what else is ready must not wait for this thread's turn.
        if !state.ready.is_empty() || !state.leading {
            self.rouse(&mut state);
        }
        turn
    }

    /// Whether a key that is more urgent than `priority` waits for a thread, or for `actor` to end its turn.
    pub fn urgent(&self, actor: u64, priority: u32) -> bool {
        let mut state = lock(&self.state);
        self.drain(&mut state);
        if !state.leading {
            let mut events: Events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
            let found = self.poll(&mut events, 0);
            self.found(&mut state, &events[..found]);
        }
        if !state.ready.is_empty() && state.followers > 0 {
            self.rouse(&mut state);
        }
        let before = |entry: Option<&Entry>| entry.is_some_and(|entry| entry.0 < priority);
        before(state.ready.first()) || before(state.actors.get(&actor).and_then(|actor| actor.ready.first()))
    }

    fn follow<'a>(&self, mut state: MutexGuard<'a, State>, left: Option<Duration>) -> MutexGuard<'a, State> {
        state.followers += 1;
        state = match left {
            None => self.followers.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(left) => self.followers.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
        };
        state.followers -= 1;
        state
    }

    fn lead<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        left: Option<Duration>,
        events: &mut Events,
    ) -> MutexGuard<'a, State> {
        let quiet = state.receivers.iter().all(|attached| attached.faulted || attached.receiver.consumer().sleep());
        if !quiet {
            state.wake_receivers();
            // Let others at the state: a producer that keeps sending what is dropped could keep us here.
            drop(state);
            std::thread::yield_now();
            return lock(&self.state);
        }
        state.leading = true;
        drop(state);
        // Rounded up: waking early would only mean coming back for nothing.
        let milliseconds = left.map_or(-1, |left| left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
        let found = self.poll(events, milliseconds);
        let mut state = lock(&self.state);
        state.leading = false;
        state.wake_receivers();
        self.found(&mut state, &events[..found]);
        state
    }

    /// Wait for descriptors; a signal counts as nothing found.
    fn poll(&self, events: &mut Events, milliseconds: i32) -> usize {
        // SAFETY: the array outlives the call and has room for BATCH events.
        let found =
            unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), BATCH as i32, milliseconds) };
        usize::try_from(found).unwrap_or(0)
    }

    fn found(&self, state: &mut State, events: &[libc::epoll_event]) {
        for event in events {
            let token = event.u64;
            if token == KICK {
                let mut count = 0u64;
                // SAFETY: eight bytes are written to `count`; the eventfd is our own and does not block.
                unsafe { libc::read(self.kick.as_raw_fd(), (&raw mut count).cast(), 8) };
                state.kicked = false;
                continue;
            }
            match state.watches.get(&token) {
                Some(Watch::Fd(_, key)) => {
                    let key = *key;
                    if let Some(key) = state.keys.get_mut(&key) {
                        key.fired.push(token);
                    }
                    state.mark(key);
                }
                Some(Watch::Bell(bell)) => {
                    bell.drain();
                    if bell.deaf() {
                        self.unring(state, &[token]);
                    }
                }
                // Removed while it was reported.
                None => {}
            }
        }
    }

    fn drain(&self, state: &mut State) {
        let mut keys = std::mem::take(&mut state.keys_taken);
        for index in 0..state.receivers.len() {
            let attached = &mut state.receivers[index];
            if attached.faulted {
                continue;
            }
            let mut consumer = attached.receiver.consumer();
            consumer.drain(BUDGET, &mut keys);
            if consumer.fault().is_some() {
                drop(consumer);
                attached.faulted = true;
                keys.push(attached.fault_key);
                let bells = std::mem::take(&mut attached.bells);
                self.unring(state, &bells);
            }
        }
        for key in keys.drain(..) {
            state.mark(key);
        }
        state.keys_taken = keys;
    }

    /// Something is ready, or nobody leads: one of the threads that wait should look.
    fn rouse(&self, state: &mut State) {
        if state.followers > 0 {
            self.followers.notify_one();
        } else {
            self.kick(state);
        }
    }

    /// Call the leader back from epoll, if there is one.
    fn kick(&self, state: &mut State) {
        if state.leading && !state.kicked {
            state.kicked = true;
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight bytes are read from `one`; the eventfd is our own and does not block.
            unsafe { libc::write(self.kick.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }

    /// The turn is over; `again`: the key goes to the end of its priority.
    pub fn done(&self, actor: u64, key: u64, again: bool) -> Result<(), ScheduleError> {
        let mut state = lock(&self.state);
        self.end(&mut state, actor, key, again)?;
        if !state.ready.is_empty() {
            self.rouse(&mut state);
        }
        Ok(())
    }

    fn end(&self, state: &mut State, actor: u64, key: u64, again: bool) -> Result<(), ScheduleError> {
        // An actor that was dropped during its turn.
        let Some(owner) = state.actors.get_mut(&actor) else { return Ok(()) };
        if owner.running != Some(key) {
            return Err(ScheduleError::NoTurn(actor, key));
        }
        owner.running = None;
        if let Some(entry) = state.keys.get_mut(&key) {
            if std::mem::take(&mut entry.marked) || again {
                // Its descriptors are looked at when it has nothing else to do.
                state.queue(key);
            } else {
                let fired = std::mem::take(&mut entry.fired);
                self.rearm(state, fired);
            }
        }
        state.list(actor);
        Ok(())
    }

    fn rearm(&self, state: &mut State, fired: Vec<u64>) {
        for token in fired {
            if let Some(Watch::Fd(fd, _)) = state.watches.get(&token) {
                let fd = *fd;
                let events = libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLONESHOT;
                if self.control(libc::EPOLL_CTL_MOD, fd, events, token).is_err() {
                    // Closed without being removed.
                    self.unwatch(state, fd);
                }
            }
        }
    }

    /// Whether it was closed.
    pub fn closed(&self) -> bool {
        lock(&self.state).closed
    }

    /// Every `next`, now and later, gives None.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        self.followers.notify_all();
        self.kick(&mut state);
    }
}

/// Marks a key of a scheduler of this process. Events sent are those that made the key ready; no doorbell is needed.
pub struct LocalSignal {
    scheduler: Arc<Scheduler>,
    key: u64,
    counters: Counters,
}

impl LocalSignal {
    /// Mark `key`.
    pub fn new(scheduler: Arc<Scheduler>, key: u64) -> Self {
        Self { scheduler, key, counters: Counters::default() }
    }
}

impl Notify for LocalSignal {
    fn notify(&self) {
        self.counters.signalled.fetch_add(1, Ordering::Relaxed);
        if self.scheduler.mark(self.key) {
            self.counters.sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn counters(&self) -> [u64; 3] {
        self.counters.get()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        for attached in lock(&self.state).receivers.drain(..) {
            attached.receiver.consumer().wake();
            attached.receiver.attached.store(false, Ordering::Release);
        }
    }
}

/// What a mark did.
enum Mark {
    /// Nothing: the key was ready, or is unknown.
    Known,
    /// The key is ready, behind its actor's turn or a better key of its actor.
    Waits,
    /// The key can be handed out.
    Listed,
}

impl State {
    fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn mark(&mut self, key: u64) -> Mark {
        let Some(entry) = self.keys.get_mut(&key) else { return Mark::Known };
        if let Some(route) = &entry.route {
            route.call();
            return Mark::Known;
        }
        let actor = entry.actor;
        if self.actors.get(&actor).is_some_and(|actor| actor.running == Some(key)) {
            return if std::mem::replace(&mut entry.marked, true) { Mark::Known } else { Mark::Waits };
        }
        if entry.queued.is_some() {
            return Mark::Known;
        }
        self.queue(key);
        if self.list(actor) {
            Mark::Listed
        } else {
            Mark::Waits
        }
    }

    fn queue(&mut self, key: u64) {
        self.last_order += 1;
        if let Some(entry) = self.keys.get_mut(&key) {
            let place = (entry.priority, self.last_order, key);
            entry.queued = Some(place);
            if let Some(actor) = self.actors.get_mut(&entry.actor) {
                actor.ready.insert(place);
            }
        }
    }

    /// Bring an actor's entry among all actors up to date; true when it has one now and it is a new one.
    fn list(&mut self, actor: u64) -> bool {
        let Some(actor) = self.actors.get_mut(&actor) else { return false };
        let best = if actor.running.is_none() { actor.ready.first().copied() } else { None };
        if best == actor.listed {
            return false;
        }
        if let Some(old) = std::mem::replace(&mut actor.listed, best) {
            self.ready.remove(&old);
        }
        if let Some(new) = best {
            self.ready.insert(new);
        }
        best.is_some()
    }

    fn take(&mut self) -> Option<(u64, u64)> {
        let place = *self.ready.first()?;
        let (_, _, key) = place;
        let entry = self.keys.get_mut(&key)?;
        entry.queued = None;
        let actor = entry.actor;
        let owner = self.actors.get_mut(&actor)?;
        owner.ready.remove(&place);
        owner.running = Some(key);
        self.list(actor);
        Some((actor, key))
    }

    fn wake_receivers(&mut self) {
        for attached in &self.receivers {
            attached.receiver.consumer().wake();
        }
    }
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made by the caller, and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
