//! Doorbells: eventfds that another process shares, rung and heard without ever being stuck in them.
//!
//! The other process shares the open file description, not only the counter: it can clear O_NONBLOCK and fill the
//! counter, and then a write blocks until somebody reads. Looking first does not help, since it can do so in between;
//! and eventfds have no write that refuses to block by itself. So there is a way out instead of a way around: a guard
//! thread, one a process, notices a thread that has been inside such a call for longer than a tick and sends it a
//! signal whose handler does nothing. The call ends with EINTR, the doorbell is called jammed, and is not written again.
//!
//! The guard is started by the first doorbell, sleeps without a timeout while there are none, and otherwise looks every
//! `TICK`. It has all signals blocked and touches nothing but the list of threads below. That list is made of atomics
//! only, so that neither a thread that ends nor a process that forks can leave it locked.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{fence, AtomicBool, AtomicI32, AtomicPtr, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::area::{check_range, LayoutError};
use crate::event::{Bell, Counters, Shown};
use crate::mem::Window;
use crate::signal::Notify;

/// How long a call that cannot block by rights may take before it is broken off, at least; at most twice that.
const TICK: Duration = Duration::from_millis(200);

/// An eventfd that another process shares.
#[derive(Debug)]
pub struct Doorbell {
    fd: OwnedFd,
    jammed: AtomicBool,
    deaf: AtomicBool,
}

impl Doorbell {
    /// Take a duplicate of `fd`, which must be an eventfd: any other file may block in ways that nothing breaks off.
    pub fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // Duplicated first, so that what is checked is what is used.
        let fd = fd.try_clone_to_owned()?;
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if kind.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a doorbell must be an eventfd"));
        }
        set_nonblocking(fd.as_raw_fd())?;
        guard::start()?;
        guard::doorbell_made();
        Ok(Self { fd, jammed: AtomicBool::new(false), deaf: AtomicBool::new(false) })
    }

    /// A doorbell of this process alone.
    pub fn create() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Self::new(std::os::fd::AsFd::as_fd(&fd))
    }

    /// Add one. False when the bell is full or jammed: then the other side has more than it can hear.
    pub fn ring(&self) -> bool {
        if self.jammed() {
            return false;
        }
        // Usually there is nothing to break off, even when the other side did its worst: it can only get us stuck by
        // filling the counter between this look and the write.
        // SAFETY: no pointers are involved.
        let flags = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_GETFL) };
        if flags & libc::O_NONBLOCK == 0 && !self.ready(libc::POLLOUT) {
            self.jammed.store(true, Ordering::Relaxed);
            return false;
        }
        self.ring_guarded()
    }

    fn ring_guarded(&self) -> bool {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes are read from `one`, which outlives the call.
        let call = || unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        match guard::guarded(call) {
            Ok(_) => true,
            Err(error) => {
                if error.kind() == io::ErrorKind::Interrupted {
                    self.jammed.store(true, Ordering::Relaxed);
                }
                false
            }
        }
    }

    /// How many rings since the last drain; 0 when none. Never blocks.
    pub fn drain(&self) -> u64 {
        let mut count = [0u8; 8];
        let vector = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // For reads there is a flag that no peer can clear.
        // SAFETY: the vector describes `count`, which outlives the call.
        let got = unsafe { libc::preadv2(self.fd.as_raw_fd(), &vector, 1, -1, libc::RWF_NOWAIT) };
        if got == 8 {
            return u64::from_ne_bytes(count);
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::EPERM) => self.drain_guarded(),
            _ => 0,
        }
    }

    /// `drain` for kernels whose eventfds do not know RWF_NOWAIT.
    fn drain_guarded(&self) -> u64 {
        if self.deaf() || !self.ready(libc::POLLIN) {
            return 0;
        }
        self.read_guarded()
    }

    fn read_guarded(&self) -> u64 {
        let mut count = [0u8; 8];
        // SAFETY: eight bytes are written to `count`, which outlives the call.
        let call = || unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        match guard::guarded(call) {
            Ok(8) => u64::from_ne_bytes(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.deaf.store(true, Ordering::Relaxed);
                0
            }
            _ => 0,
        }
    }

    fn ready(&self, events: libc::c_short) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
        // SAFETY: one pollfd, which outlives the call; a timeout of 0 does not block.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready == 1 && poll.revents & events != 0
    }

    /// A ring had to be broken off: the other side made the eventfd blocking and full. Stays true.
    pub fn jammed(&self) -> bool {
        self.jammed.load(Ordering::Relaxed)
    }

    /// A drain had to be broken off. Stays true; `drain` does nothing from then on, and nobody should wait for this bell.
    pub fn deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }
}

impl Bell for Doorbell {
    fn ring(&self) -> bool {
        Doorbell::ring(self)
    }
}

impl Bell for Arc<Doorbell> {
    fn ring(&self) -> bool {
        Doorbell::ring(self)
    }
}

/// One notification, one doorbell.
pub struct DirectSignal {
    bell: Arc<Doorbell>,
    counters: Counters,
    stats: Option<(Window, usize)>,
}

impl DirectSignal {
    /// `stats`: an area and the offset of 24 bytes in it, written by this side only: u64 signalled, sent, rung.
    pub fn new(bell: Arc<Doorbell>, stats: Option<(Window, usize)>) -> Result<Self, LayoutError> {
        if let Some((area, offset)) = &stats {
            check_range("stats", area.size(), *offset, 3, 8, 8)?;
        }
        Ok(Self { bell, counters: Counters::default(), stats })
    }
}

impl Notify for DirectSignal {
    fn notify(&self) {
        // What was published before must be visible before the other side is woken: the system call sees to that.
        let rung = self.bell.ring();
        let Counters { signalled, sent, rung: rings } = &self.counters;
        for (which, counter) in [signalled, sent, rings].into_iter().take(if rung { 3 } else { 2 }).enumerate() {
            match &self.stats {
                Some((area, offset)) => {
                    let shown = Shown { area, offset: offset + which * 8, counter, before: 0 };
                    let count = shown.count();
                    fence(Ordering::SeqCst);
                    shown.settle(count);
                }
                None => {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn counters(&self) -> [u64; 3] {
        self.counters.get()
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        guard::doorbell_gone();
    }
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are involved; a bad descriptor gives an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The guard thread and the list of threads that it watches.
mod guard {
    use super::*;

    /// A thread's entry. Entries are made when needed, used again after their thread has ended, and never freed.
    struct Watched {
        taken: AtomicBool,
        tid: AtomicI32,
        /// Odd while the thread is inside a guarded call; another value for each call.
        turn: AtomicU32,
        /// The turn that the guard has broken off.
        broken: AtomicU32,
        /// The turn that the guard saw at its last tick; the guard's own.
        seen: AtomicU32,
        next: *const Watched,
    }

    static LIST: AtomicPtr<Watched> = AtomicPtr::new(ptr::null_mut());
    static DOORBELLS: AtomicU32 = AtomicU32::new(0);
    static STARTED: AtomicBool = AtomicBool::new(false);
    static SIGNAL: AtomicI32 = AtomicI32::new(0);

    struct Lease(&'static Watched);

    thread_local! {
        static LEASE: Lease = Lease::new();
    }

    impl Lease {
        fn new() -> Self {
            unblock();
            let mut entry = LIST.load(Ordering::Acquire).cast_const();
            // SAFETY: entries are never freed, and `next` is not changed once the entry is in the list.
            while let Some(watched) = unsafe { entry.as_ref() } {
                if !watched.taken.swap(true, Ordering::AcqRel) {
                    watched.tid.store(tid(), Ordering::Release);
                    return Self(watched);
                }
                entry = watched.next;
            }
            let watched = Box::leak(Box::new(Watched {
                taken: AtomicBool::new(true),
                tid: AtomicI32::new(tid()),
                turn: AtomicU32::new(0),
                broken: AtomicU32::new(0),
                seen: AtomicU32::new(0),
                next: ptr::null(),
            }));
            let mut first = LIST.load(Ordering::Acquire);
            loop {
                watched.next = first;
                match LIST.compare_exchange(first, watched, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => return Self(watched),
                    Err(now) => first = now,
                }
            }
        }
    }

    impl Drop for Lease {
        fn drop(&mut self) {
            self.0.taken.store(false, Ordering::Release);
        }
    }

    fn tid() -> i32 {
        // SAFETY: takes nothing, always succeeds.
        unsafe { libc::gettid() }
    }

    /// Do a system call that would not block if the other side kept to the rules. Interrupted means broken off.
    pub fn guarded(mut call: impl FnMut() -> isize) -> io::Result<isize> {
        if !STARTED.load(Ordering::Relaxed) {
            start()?;
        }
        LEASE
            .try_with(|lease| inside(lease, &mut call))
            // The thread is ending and has given its entry back already.
            .unwrap_or_else(|_| inside(&Lease::new(), &mut call))
    }

    fn inside(lease: &Lease, call: &mut impl FnMut() -> isize) -> io::Result<isize> {
        let watched = lease.0;
        let turn = watched.turn.load(Ordering::Relaxed).wrapping_add(1);
        watched.turn.store(turn, Ordering::Release);
        let result = loop {
            let result = call();
            if result >= 0 {
                break Ok(result);
            }
            let error = io::Error::last_os_error();
            // Other signals come too; only the guard's counts. It tells before it sends.
            if error.kind() != io::ErrorKind::Interrupted || watched.broken.load(Ordering::Acquire) == turn {
                break Err(error);
            }
        };
        watched.turn.store(turn.wrapping_add(1), Ordering::Release);
        result
    }

    pub fn doorbell_made() {
        if DOORBELLS.fetch_add(1, Ordering::Release) == 0 {
            // SAFETY: the word is static; FUTEX_WAKE only uses its address.
            unsafe {
                libc::syscall(libc::SYS_futex, DOORBELLS.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1)
            };
        }
    }

    pub fn doorbell_gone() {
        DOORBELLS.fetch_sub(1, Ordering::Release);
    }

    /// Start the guard unless it runs: at the first doorbell, and again in the child of a fork.
    pub fn start() -> io::Result<()> {
        if STARTED.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let started = install().and_then(|()| spawn());
        if started.is_err() {
            STARTED.store(false, Ordering::Release);
        }
        started
    }

    fn spawn() -> io::Result<()> {
        // The thread inherits a mask with everything blocked: a process's signals belong to its other threads.
        // SAFETY: sigset_t is plain data that sigfillset fills; both sets outlive the calls.
        let before = unsafe {
            let mut all = std::mem::zeroed::<libc::sigset_t>();
            let mut before = std::mem::zeroed::<libc::sigset_t>();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            before
        };
        let spawned = std::thread::Builder::new().name("vbus-guard".into()).stack_size(64 << 10).spawn(watch);
        // SAFETY: `before` was filled above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut()) };
        spawned.map(drop)
    }

    /// Give one real-time signal that nobody uses a handler that does nothing, once a process and its children.
    fn install() -> io::Result<()> {
        if SIGNAL.load(Ordering::Acquire) != 0 {
            return Ok(());
        }
        // From the top: libraries and people count from SIGRTMIN upwards.
        for signal in (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev() {
            // SAFETY: sigaction is plain data; the pointers are to locals that outlive the calls; the handler is an
            // extern "C" function that touches nothing.
            unsafe {
                let mut now = std::mem::zeroed::<libc::sigaction>();
                if libc::sigaction(signal, ptr::null(), &mut now) != 0 || now.sa_sigaction != libc::SIG_DFL {
                    continue;
                }
                let mut action = std::mem::zeroed::<libc::sigaction>();
                action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
                // Without SA_RESTART, or the call would go on.
                action.sa_flags = libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                if libc::sigaction(signal, &action, ptr::null_mut()) != 0 {
                    return Err(io::Error::last_os_error());
                }
                if libc::pthread_atfork(None, None, Some(forked)) != 0 {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
            }
            SIGNAL.store(signal, Ordering::Release);
            return Ok(());
        }
        Err(io::Error::other("every real-time signal is in use: none is left to guard doorbells with"))
    }

    extern "C" fn nothing(_signal: libc::c_int) {}

    /// In the child of a fork, whose only thread this is: the guard is gone, and the thread has a new number.
    extern "C" fn forked() {
        STARTED.store(false, Ordering::Release);
        let _ = LEASE.try_with(|lease| lease.0.tid.store(tid(), Ordering::Release));
    }

    /// A thread may have inherited a mask with everything blocked.
    fn unblock() {
        // SAFETY: sigset_t is plain data that sigemptyset fills; it outlives the calls.
        unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, SIGNAL.load(Ordering::Acquire));
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
        }
    }

    #[cfg(test)]
    pub fn entries() -> usize {
        let mut entry = LIST.load(Ordering::Acquire).cast_const();
        let mut count = 0;
        // SAFETY: entries are never freed, and `next` is not changed once the entry is in the list.
        while let Some(watched) = unsafe { entry.as_ref() } {
            count += 1;
            entry = watched.next;
        }
        count
    }

    fn watch() {
        let signal = SIGNAL.load(Ordering::Acquire);
        loop {
            if DOORBELLS.load(Ordering::Acquire) == 0 {
                let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
                // SAFETY: the word is static; without a timeout (a null pointer), until it is no longer 0.
                unsafe { libc::syscall(libc::SYS_futex, DOORBELLS.as_ptr(), wait, 0, ptr::null::<libc::timespec>()) };
                continue;
            }
            std::thread::sleep(TICK);
            tick(signal);
        }
    }

    fn tick(signal: libc::c_int) {
        let mut entry = LIST.load(Ordering::Acquire).cast_const();
        // SAFETY: entries are never freed, and `next` is not changed once the entry is in the list.
        while let Some(watched) = unsafe { entry.as_ref() } {
            let turn = watched.turn.load(Ordering::Acquire);
            if turn & 1 == 1 && turn == watched.seen.swap(turn, Ordering::Relaxed) {
                // Told first, sent then; and again at every tick, in case it came before the call had begun. Should
                // the thread have ended meanwhile, the signal finds nobody, or interrupts one of ours for nothing.
                watched.broken.store(turn, Ordering::Release);
                let tid = watched.tid.load(Ordering::Acquire);
                // SAFETY: no pointers are involved; the process's own number keeps it among our own threads.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) };
            }
            entry = watched.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// What a hostile peer does through its own descriptor: make the eventfd blocking, and full.
    fn sabotage(fd: RawFd, count: u64) {
        // SAFETY: no pointers are involved; then eight bytes are read from `count`.
        unsafe {
            assert_eq!(libc::fcntl(fd, libc::F_SETFL, 0), 0);
            if count > 0 {
                assert_eq!(libc::write(fd, (&raw const count).cast(), 8), 8);
            }
        }
    }

    fn pair() -> (Doorbell, OwnedFd) {
        let bell = Doorbell::create().unwrap();
        let peer = bell.fd.try_clone().unwrap();
        (bell, peer)
    }

    #[test]
    fn rings_are_counted_until_drained() {
        let (bell, _peer) = pair();
        assert_eq!(bell.drain(), 0);
        assert!(bell.ring());
        assert!(bell.ring());
        assert_eq!(bell.drain(), 2);
        assert_eq!(bell.drain(), 0);
    }

    #[test]
    fn only_eventfds_are_doorbells() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(Doorbell::new(socket.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_full_bell_is_no_jam() {
        let (bell, peer) = pair();
        let most = u64::MAX - 1;
        // SAFETY: eight bytes are read from `most`.
        unsafe { assert_eq!(libc::write(peer.as_raw_fd(), (&raw const most).cast(), 8), 8) };
        assert!(!bell.ring());
        assert!(!bell.jammed());
        assert_eq!(bell.drain(), most);
        assert!(bell.ring());
    }

    #[test]
    fn a_blocking_and_full_bell_is_not_even_written() {
        let (bell, peer) = pair();
        sabotage(peer.as_raw_fd(), u64::MAX - 1);
        assert!(!bell.ring());
        assert!(bell.jammed());
        assert_eq!(bell.drain(), u64::MAX - 1);
        assert!(!bell.ring(), "a jammed bell is never written again");
        assert_eq!(bell.drain(), 0);
    }

    #[test]
    fn a_write_that_is_stuck_is_broken_off() {
        let (bell, peer) = pair();
        sabotage(peer.as_raw_fd(), u64::MAX - 1);
        // As if the peer had done it behind the look.
        assert!(!bell.ring_guarded());
        assert!(bell.jammed());
    }

    #[test]
    fn other_signals_do_not_break_off_a_write() {
        extern "C" fn ignore(_signal: libc::c_int) {}
        let (bell, peer) = pair();
        sabotage(peer.as_raw_fd(), u64::MAX - 1);
        // SAFETY: a handler that touches nothing, without SA_RESTART, for a signal that nothing else here uses.
        unsafe {
            let mut action = std::mem::zeroed::<libc::sigaction>();
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
            assert_eq!(libc::sigaction(libc::SIGUSR2, &action, ptr::null_mut()), 0);
        }
        // SAFETY: takes nothing.
        let this = unsafe { libc::pthread_self() };
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // SAFETY: the thread waits for this one, so it is alive.
                    unsafe { libc::pthread_kill(this, libc::SIGUSR2) };
                    std::thread::yield_now();
                }
            });
            // Ends because of the guard alone.
            assert!(!bell.ring_guarded());
            over.store(true, Ordering::Relaxed);
        });
        assert!(bell.jammed());
    }

    #[test]
    fn a_stuck_read_is_broken_off() {
        let (bell, peer) = pair();
        sabotage(peer.as_raw_fd(), 0);
        assert_eq!(bell.drain(), 0);
        assert!(!bell.deaf());
        // As on a kernel without RWF_NOWAIT, with the peer emptying the counter behind the look.
        assert_eq!(bell.read_guarded(), 0);
        assert!(bell.deaf());
        assert!(bell.ring());
        assert_eq!(bell.drain_guarded(), 0, "a deaf bell is never read again that way");
    }

    #[test]
    fn reading_without_the_flag_counts_too() {
        let (bell, _peer) = pair();
        assert_eq!(bell.drain_guarded(), 0);
        assert!(bell.ring());
        assert_eq!(bell.drain_guarded(), 1);
        assert!(!bell.deaf());
    }

    #[test]
    fn ending_threads_give_their_entries_back() {
        let (bell, _peer) = pair();
        for _ in 0..100 {
            std::thread::scope(|scope| {
                scope.spawn(|| assert!(bell.ring()));
            });
        }
        assert_eq!(bell.drain(), 100);
        assert!(guard::entries() < 50, "{}", guard::entries());
    }
}
