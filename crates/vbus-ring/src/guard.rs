//! Mappings of files that their owner may truncate: what then is a bus error here becomes a lost mapping.
//!
//! The handler finds the mapping that a fault belongs to, marks it lost, puts private zeroes in its place, all of it,
//! and returns, so that whoever touched it goes on with those: Rust, or Python that copies through a view. Whoever works
//! with the memory asks afterwards whether something was lost. All other bus errors go to the handler from before, with
//! which they do what they did before.
//!
//! The handler waits for nobody. It reads a table of ranges: chunks in a list, made when the ones before are full, and
//! never moved or freed, so as many as there were mappings at one time. A mapping that is being touched stays in its
//! slot, as its user holds it; only other slots change under the handler.
//!
//! The handler is installed once, with the first mapping that wants it. Whoever installs another one later must pass on
//! what it does not know.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{fence, AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// No file behind this address any more.
const BUS_ADRERR: libc::c_int = 2;
/// The memory behind this address is broken.
const BUS_MCEERR_AR: libc::c_int = 4;

const SLOTS: usize = 64;

/// A guarded mapping's place in the table.
#[derive(Debug)]
pub struct Slot {
    /// 0: free.
    start: AtomicUsize,
    end: AtomicUsize,
    writable: AtomicBool,
    lost: AtomicBool,
}

struct Chunk {
    slots: [Slot; SLOTS],
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    const fn new() -> Self {
        Self { slots: [const { Slot::free() }; SLOTS], next: AtomicPtr::new(std::ptr::null_mut()) }
    }
}

static TABLE: Chunk = Chunk::new();
/// Mappings lost since the process began.
static LOSSES: AtomicU64 = AtomicU64::new(0);
/// Held by who takes a slot or installs the handler; whether it is installed.
static INSTALLED: Mutex<bool> = Mutex::new(false);
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// All chunks there are.
fn chunks() -> impl Iterator<Item = &'static Chunk> {
    std::iter::successors(Some(&TABLE), |chunk| {
        // SAFETY: null, or a chunk that is never freed; acquire, so that it is seen as it was made.
        unsafe { chunk.next.load(Ordering::Acquire).as_ref() }
    })
}

/// Mappings lost since the process began, those included whose zeroes this thread has read.
#[inline]
pub fn losses() -> u64 {
    fence(Ordering::Acquire);
    LOSSES.load(Ordering::Acquire)
}

impl Slot {
    const fn free() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            writable: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }
    }

    /// Guard what has just been mapped at `start`: whole pages, of which the last may not be wanted wholly.
    pub(crate) fn take(start: usize, size: usize, writable: bool) -> io::Result<&'static Self> {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            install()?;
            *installed = true;
        }
        let slot = match chunks().flat_map(|chunk| &chunk.slots).find(|slot| slot.start.load(Ordering::Acquire) == 0) {
            Some(slot) => slot,
            None => {
                let last = chunks().last().unwrap_or(&TABLE);
                let chunk = Box::leak(Box::new(Chunk::new()));
                last.next.store(chunk, Ordering::Release);
                &chunk.slots[0]
            }
        };
        // SAFETY: it only asks.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        slot.lost.store(false, Ordering::Relaxed);
        slot.writable.store(writable, Ordering::Relaxed);
        slot.end.store(start + size.next_multiple_of(page), Ordering::Relaxed);
        // Release: the rest first.
        slot.start.store(start, Ordering::Release);
        Ok(slot)
    }

    /// Guard it no more. Before it is unmapped: the addresses may be another's right after.
    pub(crate) fn give_back(&self) {
        self.start.store(0, Ordering::Release);
    }

    /// Whether zeroes are in place of what was mapped.
    pub(crate) fn lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Whether it has this address; then where it begins and ends.
    fn find(&self, address: usize) -> Option<(usize, usize)> {
        let start = self.start.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Acquire);
        // Again: a slot that became another's meanwhile is not that of a fault.
        (start != 0 && (start..end).contains(&address) && self.start.load(Ordering::Relaxed) == start)
            .then_some((start, end))
    }
}

fn install() -> io::Result<()> {
    let ask = |new: *const libc::sigaction| {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: both are valid for the call or null; an action of zeroes is a valid one.
        match unsafe { (libc::sigaction(libc::SIGBUS, new, old.as_mut_ptr()), old.assume_init()) } {
            (0, old) => Ok(old),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // Known before the handler may need it.
    let before = ask(std::ptr::null())?;
    BEFORE.get_or_init(|| before);
    let action: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    // SAFETY: an action of zeroes is a valid one: no flags, an empty mask.
    let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    new.sa_sigaction = action as usize;
    // On the thread's own stack for signals when it has one, as the fault may be anywhere.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    ask(&new).map(drop)
}

/// Runs in whatever thread had the fault, between any two of its instructions: no locks, no memory, no panics.
extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the thread's own, and the code that was interrupted may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the system gives it with every signal of an action with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    // Others have no address, but something else in its place.
    let fault = code == BUS_ADRERR || code == BUS_MCEERR_AR;
    // SAFETY: as above, and a fault has an address.
    if !(fault && retire(unsafe { (*info).si_addr() } as usize)) {
        // SAFETY: what the system gave us.
        unsafe { pass_on(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Put zeroes in place of the mapping that has this address, if it is a guarded one.
fn retire(address: usize) -> bool {
    for slot in chunks().flat_map(|chunk| &chunk.slots) {
        let Some((start, end)) = slot.find(address) else {
            continue;
        };
        let protection =
            if slot.writable.load(Ordering::Relaxed) { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // Before the zeroes: whoever has read one must be able to know it.
        slot.lost.store(true, Ordering::Release);
        LOSSES.fetch_add(1, Ordering::Release);
        // SAFETY: exactly what a mapping has, which somebody is touching and so holds. It may be that another thread
        // has done the same already: then what was written to its zeroes is gone, too.
        let zeroes = unsafe { libc::mmap(start as *mut libc::c_void, end - start, protection, flags, -1, 0) };
        return zeroes != libc::MAP_FAILED;
    }
    false
}

/// What would have happened without us.
///
/// # Safety
///
/// The arguments are what the system gave to our handler.
unsafe fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: by the caller's word.
    let sent = unsafe { (*info).si_code } <= 0;
    let (action, flags) = BEFORE.get().map_or((libc::SIG_DFL, 0), |before| (before.sa_sigaction, before.sa_flags));
    match action {
        libc::SIG_IGN if sent => (),
        // A fault cannot be ignored.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default action is one. A fault comes again when we return; what was sent is sent again, and
            // comes then, too.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                if sent {
                    libc::raise(signal);
                }
            }
        }
        action if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: what was installed with this flag takes these arguments.
            let action: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(action) };
            action(signal, info, context);
        }
        action => {
            // SAFETY: what was installed without the flag takes this one.
            let action: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(action) };
            action(signal);
        }
    }
}
