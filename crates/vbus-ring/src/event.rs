//! The event ring: how many sources of one side say "look at me" to the other side, with few doorbells.
//!
//! A source is a queue, a config space or a channel. Its events travel through one ring a priority; a more urgent
//! priority is drained first and has a doorbell of its own. Data flows like this:
//!
//! ```text
//!  producer (any threads)                     shared                    consumer (one at a time)
//!  publish the queue's state
//!  FENCE Published
//!  taken == sent?  <------------------------- taken[source] <---------- write taken          (drain)
//!  claim: sent + 1 by CAS (private)                                     FENCE Taken
//!  write the slot, release its sequence ----> slots ------------------> take, check          service the queue
//!  FENCE Sent
//!  odd?            <------------------------- sleep_seq <-------------- odd                  (sleep)
//!  rung != it? ring its doorbell                                        FENCE Asleep
//!                                                                       look at the slots again, then sleep
//! ```
//!
//! Each fence pairs with one of the other side: Published with Taken (either the producer sees that its last event was
//! taken and sends another, or the service that follows sees what was published), Sent with Asleep (either the producer
//! sees the consumer asleep and rings, or the consumer's last look sees the slot). All four order a store before a load
//! of another word, which only a full fence does.
//!
//! A source has at most one event outstanding, and a ring has a slot for every source: it never overflows and nobody
//! waits. No shared word is the target of a read-modify-write: each is written by exactly one side, with plain stores;
//! what producers of several threads compete for is private to their process.
//!
//! A source is opened with a generation that differs from its last one, in this order: the producer closes, the consumer
//! opens, the producer opens. Both halves of the pair (`sent`, `taken`) then start at 0, and what an older generation
//! left in the ring is dropped without touching `taken`, which belongs to the new one.
//!
//! Trust: a producer reads `taken` and `sleep_seq` only; lies there make it send too much or too little into the liar's
//! own ring. A consumer checks each slot's source and generation after reading them once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::area::{check_range, Area, LayoutError};
use crate::signal::Notify;
use crate::sync::{full_fence, AtomicBool, AtomicU32, AtomicU64, Counter, Ordering, Site};
use crate::violation::{Rule, Violation};

const SLOT_BYTES: usize = 16;
const STATS_BYTES: usize = 32;
const TAKEN_BYTES: usize = 4;
/// A line each: a sleep word is read on every event, and its neighbours change at other times.
const SLEEP_BYTES: usize = 64;

/// Priorities that a direction may have at most.
pub const MAX_PRIORITIES: u32 = 8;

/// Where one direction's event rings lie in an area, in bytes, and how large they are.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Per priority `max_sources` slots of 16 bytes: u32 sequence, source, generation, 0. Written by the producer.
    pub slots: usize,
    /// A u32 a source, written by the consumer.
    pub taken: usize,
    /// Per priority one u32 at the start of 64 bytes, written by the consumer; odd while it sleeps.
    pub sleep: usize,
    /// Sources, and slots of a ring: a power of two.
    pub max_sources: u32,
    /// Rings: 1 to 8.
    pub priorities: u32,
}

impl Geometry {
    fn check(&self, size: usize) -> Result<(), LayoutError> {
        if !self.max_sources.is_power_of_two() || self.max_sources > 1 << 31 {
            return Err(LayoutError::Count("max_sources must be a power of two"));
        }
        if !(1..=MAX_PRIORITIES).contains(&self.priorities) {
            return Err(LayoutError::Count("priorities must be 1 to 8"));
        }
        let sources = self.max_sources as usize;
        let priorities = self.priorities as usize;
        let slots = sources.checked_mul(priorities).ok_or(LayoutError::Count("max_sources is too large"))?;
        check_range("slots", size, self.slots, slots, SLOT_BYTES, SLOT_BYTES)?;
        check_range("taken", size, self.taken, sources, TAKEN_BYTES, TAKEN_BYTES)?;
        check_range("sleep", size, self.sleep, priorities, SLEEP_BYTES, SLEEP_BYTES)
    }

    #[inline(always)]
    fn slot(&self, priority: usize, position: u32) -> usize {
        let index = priority * self.max_sources as usize + (position & (self.max_sources - 1)) as usize;
        self.slots + index * SLOT_BYTES
    }

    #[inline(always)]
    fn taken(&self, source: u32) -> usize {
        self.taken + source as usize * TAKEN_BYTES
    }

    #[inline(always)]
    fn sleep(&self, priority: usize) -> usize {
        self.sleep + priority * SLEEP_BYTES
    }
}

/// A caller's mistake: a source or a priority that the geometry does not have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OpenError {
    /// `source >= max_sources`.
    #[error("source {0} is out of range: the ring has {1}")]
    Source(u32, u32),
    /// `priority >= priorities`.
    #[error("priority {0} is out of range: the ring has {1}")]
    Priority(u32, u32),
}

/// What rings when the consumer sleeps.
pub trait Bell: Send + Sync {
    /// Ring without ever blocking; false when the ring was not delivered.
    fn ring(&self) -> bool;
}

/// Signalled, sent, rung: always counted.
#[derive(Debug, Default)]
pub struct Counters {
    /// Calls of `signal`.
    pub signalled: Counter,
    /// Events that went out.
    pub sent: Counter,
    /// Doorbells that rang.
    pub rung: Counter,
}

impl Counters {
    /// The three values.
    pub fn get(&self) -> [u64; 3] {
        [&self.signalled, &self.sent, &self.rung].map(|counter| counter.load(Ordering::Relaxed))
    }
}

/// A counter and the shared word that shows it to the other side.
pub(crate) struct Shown<'a, A> {
    pub area: &'a A,
    pub offset: usize,
    pub counter: &'a Counter,
    /// Added to what is shown.
    pub before: u64,
}

impl<A: Area> Shown<'_, A> {
    /// Count one; the new value.
    #[inline(always)]
    pub fn count(&self) -> u64 {
        let value = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        self.show(value);
        value
    }

    #[inline(always)]
    fn show(&self, value: u64) {
        // Relaxed: nothing is concluded from a counter.
        self.area.store64(self.offset, self.before + value, Ordering::Relaxed);
    }

    /// Show the counter again until the last value is the one shown: of two threads that count at the same time, the
    /// slower may have shown its smaller value last. To be called behind a full fence that is behind `count`.
    #[inline(always)]
    pub fn settle(&self, mut shown: u64) {
        loop {
            let now = self.counter.load(Ordering::Relaxed);
            if now == shown {
                return;
            }
            shown = now;
            self.show(now);
            // The store above before the next look at the counter, or both threads could miss the other's value.
            std::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}

/// One generation of a source, as `Producer::open` made it.
#[derive(Debug)]
pub struct Source {
    source: u32,
    generation: u32,
    priority: usize,
    /// Set for good by `close` and by the next `open`. Only spares work: what makes late signals harmless is that the
    /// claim's CAS covers the generation.
    closed: AtomicBool,
    counters: Counters,
    /// What earlier generations counted: the shared words go on from there.
    before: [u64; 3],
}

impl Source {
    /// Counted since this generation was opened.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// Private to the producing side, one a priority; alone on its lines, as all producers of the priority write it.
#[repr(align(128))]
struct Ring<B> {
    /// Slots handed to producers so far.
    tail: AtomicU32,
    /// The `sleep_seq` that the doorbell was last rung for.
    rung: AtomicU32,
    bell: B,
}

#[derive(Default)]
struct Opened {
    current: Option<Arc<Source>>,
    before: [u64; 3],
}

impl Opened {
    fn close(&mut self) {
        if let Some(source) = self.current.take() {
            source.closed.store(true, Ordering::Relaxed);
            for (sum, value) in self.before.iter_mut().zip(source.counters.get()) {
                *sum += value;
            }
        }
    }
}

/// The producing side of one direction's rings. Any thread may signal.
pub struct Producer<A, B> {
    area: A,
    geometry: Geometry,
    stats: usize,
    /// Per source: its generation above, `sent` below, in one word so that a claim fails once the generation changed.
    states: Box<[AtomicU64]>,
    rings: Box<[Ring<B>]>,
    opened: Mutex<Box<[Opened]>>,
    /// Whether every signal rings, whoever sleeps: one notification, one doorbell.
    always: bool,
}

fn state(generation: u32, sent: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(sent)
}

impl<A: Area, B: Bell> Producer<A, B> {
    /// `stats`: offset of 32 bytes a source (u64 signalled, sent, rung, 0), written by this side only; `bells`: one a
    /// priority.
    pub fn new(area: A, geometry: Geometry, stats: usize, bells: Vec<B>) -> Result<Self, LayoutError> {
        geometry.check(area.size())?;
        let sources = geometry.max_sources as usize;
        check_range("stats", area.size(), stats, sources, STATS_BYTES, 8)?;
        if bells.len() != geometry.priorities as usize {
            return Err(LayoutError::Count("there must be one doorbell a priority"));
        }
        let ring = |bell| Ring { tail: AtomicU32::new(0), rung: AtomicU32::new(0), bell };
        Ok(Self {
            area,
            geometry,
            stats,
            states: (0..sources).map(|_| AtomicU64::new(0)).collect(),
            rings: bells.into_iter().map(ring).collect(),
            opened: Mutex::new((0..sources).map(|_| Opened::default()).collect()),
            always: false,
        })
    }

    /// Ring for every signal, as connectors do that have no event rings: to compare with.
    pub fn always(mut self, always: bool) -> Self {
        self.always = always;
        self
    }

    fn opened(&self) -> MutexGuard<'_, Box<[Opened]>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Start a generation of a source; an older one of it ends. The consumer must have opened it before.
    pub fn open(&self, source: u32, generation: u32, priority: u32) -> Result<Arc<Source>, OpenError> {
        if source >= self.geometry.max_sources {
            return Err(OpenError::Source(source, self.geometry.max_sources));
        }
        if priority >= self.geometry.priorities {
            return Err(OpenError::Priority(priority, self.geometry.priorities));
        }
        let mut opened = self.opened();
        let entry = &mut opened[source as usize];
        entry.close();
        // A swap, though nobody wants the old value: all writes of this word being read-modify-writes, a late claim of
        // the old generation either comes before this one or fails. Relaxed: whoever hands the new `Source` to another
        // thread orders this before its use there.
        self.states[source as usize].swap(state(generation, 0), Ordering::Relaxed);
        let new = Arc::new(Source {
            source,
            generation,
            priority: priority as usize,
            closed: AtomicBool::new(false),
            counters: Counters::default(),
            before: entry.before,
        });
        entry.current = Some(new.clone());
        Ok(new)
    }

    /// Signals of this source do nothing from now on.
    pub fn close(&self, source: u32) -> Result<(), OpenError> {
        match self.opened().get_mut(source as usize) {
            Some(entry) => {
                entry.close();
                Ok(())
            }
            None => Err(OpenError::Source(source, self.geometry.max_sources)),
        }
    }

    /// Signalled, sent, rung: sums over all sources and generations.
    pub fn counters(&self) -> [u64; 3] {
        let mut sums = [0; 3];
        for entry in self.opened().iter() {
            let current = entry.current.as_ref().map_or([0; 3], |source| source.counters.get());
            for (sum, (before, now)) in sums.iter_mut().zip(entry.before.iter().zip(current)) {
                *sum += before + now;
            }
        }
        sums
    }

    /// A source's counter as the other side sees it.
    #[inline(always)]
    fn shown<'a>(&'a self, source: &'a Source, which: usize) -> Shown<'a, A> {
        let counter = [&source.counters.signalled, &source.counters.sent, &source.counters.rung][which];
        let offset = self.stats + source.source as usize * STATS_BYTES + which * 8;
        Shown { area: &self.area, offset, counter, before: source.before[which] }
    }

    /// Say that the source's state, which the caller published before, deserves a look. Never waits.
    pub fn signal(&self, source: &Source) {
        if source.closed.load(Ordering::Relaxed) {
            return;
        }
        let signalled = self.shown(source, 0);
        let count = signalled.count();

        // What the caller published before the look at `taken`. Without this fence both sides could look too early:
        // we see the last event outstanding, and its service, already past `taken`, does not see what was published.
        full_fence(Site::Published);
        signalled.settle(count);
        if self.send(source) || self.always {
            self.wake(source);
        }
    }

    /// Put an event into the ring, unless one is outstanding; whether it did.
    #[inline(always)]
    fn send(&self, source: &Source) -> bool {
        // `taken` first, and with Acquire: it was stored after its slot was read, which was written after `sent` was
        // raised, so the `sent` read next is no older than this `taken`, and unequal means outstanding. Acquire also
        // keeps the writes to a slot below behind the consumer's reads of its last lap (see `tail`).
        let taken = self.area.load32(self.geometry.taken(source.source), Ordering::Acquire);
        let word = &self.states[source.source as usize];
        let sent = word.load(Ordering::Relaxed);
        // Unequal: an event is outstanding, and its service will come behind the fence above (or the generation is
        // over, or `taken` lies, which hurts only the liar).
        if sent != state(source.generation, taken) {
            return false;
        }
        let claimed = state(source.generation, taken.wrapping_add(1));
        // Relaxed: the claim is published by the slot's sequence number. A loser of this race need not do more: the
        // winner's event was taken at the earliest behind the loser's look at `taken`, hence behind its fence.
        if word.compare_exchange(sent, claimed, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return false;
        }
        // Claims of one source are ordered by its own `taken`, so that no larger value can be shown before this one.
        self.shown(source, 1).count();

        let ring = &self.rings[source.priority];
        // AcqRel: hands on what every earlier claimer knew. Since this slot's last lap at least one source came twice,
        // and its second claim saw `taken` of the first: so the consumer is done with the slot. (loom cannot show this
        // one, nor the reason of the store to `taken`: it never lets a load see a store that comes later.)
        let position = ring.tail.fetch_add(1, Ordering::AcqRel);
        let slot = self.geometry.slot(source.priority, position);
        self.area.store32(slot + 4, source.source, Ordering::Relaxed);
        self.area.store32(slot + 8, source.generation, Ordering::Relaxed);
        // Release: whoever sees this sequence number sees the two words above.
        self.area.store32(slot, position.wrapping_add(1), Ordering::Release);
        true
    }

    /// Ring for a consumer that sleeps.
    #[inline(always)]
    fn wake(&self, source: &Source) {
        let ring = &self.rings[source.priority];
        // The slot before the look at `sleep_seq`. Without this fence we could see the consumer awake while its last
        // look before sleeping finds the slot empty.
        full_fence(Site::Sent);
        // Relaxed: the fence orders it, and the value is only compared.
        let asleep = self.area.load32(self.geometry.sleep(source.priority), Ordering::Relaxed);
        // One doorbell a sleep: whoever changes `rung` to this sleep's number rings. A slow thread that puts back an
        // older number costs a doorbell too many, never one too few, since it rings as well.
        let due = asleep & 1 == 1 && ring.rung.swap(asleep, Ordering::Relaxed) != asleep;
        if (due || self.always) && ring.bell.ring() {
            let rung = self.shown(source, 2);
            let count = rung.count();
            std::sync::atomic::fence(Ordering::SeqCst);
            rung.settle(count);
        }
    }

    /// How far `sent` is ahead of `taken`, as this thread sees them: 0 or 1, or the model is broken.
    #[cfg(loom)]
    pub fn outstanding(&self, source: &Source) -> u32 {
        let taken = self.area.load32(self.geometry.taken(source.source), Ordering::Acquire);
        let sent = self.states[source.source as usize].load(Ordering::Relaxed) as u32;
        sent.wrapping_sub(taken)
    }
}

/// A source's signal, for rings.
pub struct EventSignal<A, B> {
    producer: Arc<Producer<A, B>>,
    source: Arc<Source>,
}

impl<A: Area, B: Bell> EventSignal<A, B> {
    /// Signal `source`, which `producer` opened.
    pub fn new(producer: Arc<Producer<A, B>>, source: Arc<Source>) -> Self {
        Self { producer, source }
    }
}

impl<A: Area, B: Bell> Notify for EventSignal<A, B> {
    fn notify(&self) {
        self.producer.signal(&self.source);
    }

    fn counters(&self) -> [u64; 3] {
        self.source.counters.get()
    }
}

/// Why a consumer stopped draining: its producer broke a rule.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum EventFault {
    /// A slot names a source that the ring does not have.
    #[error("an event of priority {priority} names source {claimed}; there are {max_sources}")]
    SourceOutOfRange {
        /// The ring.
        priority: usize,
        /// What the slot said.
        claimed: u32,
        /// What the ring has.
        max_sources: u32,
    },
    /// A slot is ahead of its lap: slots were overwritten before they were taken.
    #[error("the ring of priority {priority} was overrun: sequence {sequence} where {expected} was due")]
    Overrun {
        /// The ring.
        priority: usize,
        /// What the slot said.
        sequence: u32,
        /// What comes next.
        expected: u32,
    },
}

impl From<EventFault> for Violation {
    fn from(fault: EventFault) -> Self {
        let rule = match fault {
            EventFault::SourceOutOfRange { .. } => Rule::EventSourceOutOfRange,
            EventFault::Overrun { .. } => Rule::EventRingOverrun,
        };
        Self::new(rule, fault.to_string())
    }
}

#[derive(Clone, Copy)]
struct Listener {
    open: bool,
    generation: u32,
    /// Our own copy of `taken[source]`, which is never read back.
    taken: u32,
    key: u64,
}

/// The consuming side of one direction's rings; whoever holds it drains.
pub struct Consumer<A> {
    area: A,
    geometry: Geometry,
    /// Per ring: slots taken so far.
    heads: Box<[u32]>,
    listeners: Box<[Listener]>,
    /// Keys of events that were taken while a source was opened, for the next drain.
    pending: Vec<u64>,
    /// All rings sleep and wake together, so one number does for all their words.
    sleep_seq: u32,
    taken: u64,
    dropped: u64,
    fault: Option<EventFault>,
}

impl<A: Area> Consumer<A> {
    /// A consumer of rings that nobody has used yet, awake.
    pub fn new(area: A, geometry: Geometry) -> Result<Self, LayoutError> {
        geometry.check(area.size())?;
        let nobody = Listener { open: false, generation: 0, taken: 0, key: 0 };
        Ok(Self {
            area,
            geometry,
            heads: vec![0; geometry.priorities as usize].into(),
            listeners: vec![nobody; geometry.max_sources as usize].into(),
            pending: Vec::new(),
            sleep_seq: 0,
            taken: 0,
            dropped: 0,
            fault: None,
        })
    }

    /// Events of this source and generation give `key`. To be called before the producer opens the generation.
    pub fn open(&mut self, source: u32, generation: u32, key: u64) -> Result<(), OpenError> {
        self.close(source)?;
        // Relaxed: the producer learns of the new generation through a message that follows.
        self.area.store32(self.geometry.taken(source), 0, Ordering::Relaxed);
        self.listeners[source as usize] = Listener { open: true, generation, taken: 0, key };
        Ok(())
    }

    /// Events of this source are dropped from now on.
    pub fn close(&mut self, source: u32) -> Result<(), OpenError> {
        if source >= self.geometry.max_sources {
            return Err(OpenError::Source(source, self.geometry.max_sources));
        }
        // Take what older generations left: a ring has one slot a source, and a source that is reset again and again
        // while nobody drains would fill it.
        let mut keys = std::mem::take(&mut self.pending);
        self.take(self.geometry.max_sources as usize * self.heads.len(), &mut keys);
        keys.sort_unstable();
        keys.dedup();
        self.pending = keys;
        self.listeners[source as usize].open = false;
        Ok(())
    }

    /// Take at most `budget` events, the most urgent first, and append the keys of their sources to `keys`. The caller
    /// services them after this. False when nothing was appended.
    pub fn drain(&mut self, budget: usize, keys: &mut Vec<u64>) -> bool {
        let before = keys.len();
        keys.append(&mut self.pending);
        self.take(budget, keys);
        keys.len() > before
    }

    fn take(&mut self, budget: usize, keys: &mut Vec<u64>) {
        let before = keys.len();
        let mut left = budget;
        'rings: for priority in 0..self.heads.len() {
            while left > 0 {
                match self.next(priority) {
                    Ok(Some((source, generation))) => self.accept(source, generation, keys),
                    Ok(None) => continue 'rings,
                    Err(fault) => {
                        self.fault = Some(fault);
                        break 'rings;
                    }
                }
                left -= 1;
            }
            break;
        }
        if keys.len() > before {
            // Every `taken` before the service of the queues. Without this fence a producer could see its event still
            // outstanding although the service has looked already.
            full_fence(Site::Taken);
        }
    }

    /// The sequence number at the head of a ring, if it says that an event is there.
    #[inline(always)]
    fn ready(&self, priority: usize) -> Option<u32> {
        let expected = self.heads[priority].wrapping_add(1);
        // Acquire: pairs with the release of the sequence number, so that the slot's words are those it stands for.
        let sequence = self.area.load32(self.geometry.slot(priority, self.heads[priority]), Ordering::Acquire);
        // Behind the expected number: last lap's, or the 0 of a fresh area. A slot that is claimed and not yet
        // published counts as empty; its producer will ring.
        let ahead = sequence.wrapping_sub(expected) as i32;
        (ahead == 0 || (ahead > 0 && sequence != 0)).then_some(sequence)
    }

    fn next(&mut self, priority: usize) -> Result<Option<(u32, u32)>, EventFault> {
        if self.fault.is_some() {
            return Ok(None);
        }
        let Some(sequence) = self.ready(priority) else { return Ok(None) };
        let head = self.heads[priority];
        let expected = head.wrapping_add(1);
        if sequence != expected {
            return Err(EventFault::Overrun { priority, sequence, expected });
        }
        let slot = self.geometry.slot(priority, head);
        // Each word is read once and checked as read: the producer may change it at any time.
        let source = self.area.load32(slot + 4, Ordering::Relaxed);
        let generation = self.area.load32(slot + 8, Ordering::Relaxed);
        if source >= self.geometry.max_sources {
            let max_sources = self.geometry.max_sources;
            return Err(EventFault::SourceOutOfRange { priority, claimed: source, max_sources });
        }
        self.heads[priority] = expected;
        Ok(Some((source, generation)))
    }

    fn accept(&mut self, source: u32, generation: u32, keys: &mut Vec<u64>) {
        let listener = &mut self.listeners[source as usize];
        if !listener.open || listener.generation != generation {
            // `taken` belongs to the generation that is open: counting a stale event there would leave the pair unequal
            // for good, which means silence.
            self.dropped += 1;
            return;
        }
        listener.taken = listener.taken.wrapping_add(1);
        self.taken += 1;
        keys.push(listener.key);
        // Release: the slot was read before; a producer that sees this may write over the slot a lap later.
        self.area.store32(self.geometry.taken(source), listener.taken, Ordering::Release);
    }

    /// Announce sleep on every ring and look once more. True when there is nothing: whoever signals from now on rings.
    /// False when there is something: call `wake` and drain. A consumer that is stopped by a fault finds nothing.
    pub fn sleep(&mut self) -> bool {
        if self.sleep_seq & 1 == 0 {
            self.announce();
        }
        // `sleep_seq` before the last look. Without this fence the look could come first and find the slot empty,
        // while its producer still sees us awake.
        full_fence(Site::Asleep);
        self.pending.is_empty()
            && (self.fault.is_some() || (0..self.heads.len()).all(|priority| self.ready(priority).is_none()))
    }

    /// Take back `sleep`: signals ring no more.
    pub fn wake(&mut self) {
        if self.sleep_seq & 1 == 1 {
            self.announce();
        }
    }

    fn announce(&mut self) {
        self.sleep_seq = self.sleep_seq.wrapping_add(1);
        for priority in 0..self.heads.len() {
            // Relaxed: going to sleep, the fence behind it orders it; waking up late costs a doorbell, nothing else.
            self.area.store32(self.geometry.sleep(priority), self.sleep_seq, Ordering::Relaxed);
        }
    }

    /// As the other side sees it: odd while asleep.
    pub fn sleep_seq(&self) -> u32 {
        self.sleep_seq
    }

    /// Events taken that had an open source.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Events of an old generation or of a closed source.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Why it stopped, if it did.
    pub fn fault(&self) -> Option<EventFault> {
        self.fault
    }
}
