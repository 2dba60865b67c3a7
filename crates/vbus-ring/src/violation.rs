//! Rules that the other side can break, by name.
//!
//! Everything that reads what the other side wrote reports a broken rule as a `Violation`. The names are stable: they
//! are counted, shown to operators and matched by tests, so they never change and never carry data. The details are for
//! people.

use std::fmt;

/// Which rule was broken. The text of each name is part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// A region without bytes.
    RegionEmpty,
    /// A region that passes the end of the address space.
    RegionWraps,
    /// A region that shares addresses with another one.
    RegionOverlaps,
    /// A region that is not wholly inside its mapping.
    RegionOutsideFile,
    /// A write to read-only memory.
    RegionReadOnly,
    /// No region begins at this address.
    RegionUnknown,
    /// Memory whose file was truncated while it was in use.
    RegionLost,
    /// More regions than allowed.
    TooManyRegions,
    /// More bytes of regions than allowed.
    TooMuchMemory,
    /// A range that is not wholly inside the driver's memory.
    AddressOutsideMemory,
    /// A queue size of 0, not a power of two in a split ring, or above the queue's maximum.
    QueueSize,
    /// A part of a ring off its alignment.
    RingMisaligned,
    /// A part of a ring that is not in writable memory of the driver, in one region.
    RingOutsideMemory,
    /// A place to go on that a ring of this size does not have.
    RingPosition,
    /// The available index ran ahead by more than the queue's size.
    IndexJump,
    /// A head or a next field at or above the queue's size.
    DescriptorOutOfRange,
    /// A chain that comes back to a descriptor of its own.
    DescriptorLoop,
    /// A chain of more descriptors than the queue's size.
    ChainTooLong,
    /// A chain of more than 2^32 - 1 bytes.
    ChainTooLarge,
    /// A device-readable descriptor behind a device-writable one.
    ReadableAfterWritable,
    /// A descriptor without bytes.
    ZeroLengthDescriptor,
    /// A head, a buffer id or a place of a packed ring that is made available again before it was used.
    DescriptorInUse,
    /// A descriptor of a packed ring in a chain that is available, which is not available itself.
    DescriptorNotAvailable,
    /// More pieces of memory in flight than a queue remembers.
    TooManyBuffers,
    /// An indirect descriptor where the feature was not negotiated.
    IndirectNotNegotiated,
    /// An indirect descriptor in an indirect table.
    IndirectNested,
    /// An indirect descriptor that also has a next one.
    IndirectNext,
    /// An indirect table whose length is no multiple of 16.
    IndirectTableSize,
    /// An indirect table of more entries than the queue's size.
    IndirectTableTooLong,
    /// More bytes than the request's writable part takes.
    BufferTooSmall,
    /// A region of what is in flight off its alignment.
    InflightMisaligned,
    /// A region of what is in flight that is not in its mapping, or that belongs to a ring of another size.
    InflightSize,
    /// A region of what is in flight whose layout is unknown.
    InflightVersion,
    /// A region of what is in flight with features that there are not.
    InflightFeatures,
    /// A used index that is not that of the region, or of a batch after it; of a packed ring, a used place in the region
    /// that the ring has not, or not within a lap.
    InflightUsedIndex,
    /// A batch of completions that links a head out of range; in a packed ring's region, a chain whose entries are not
    /// those that it says, or an entry that is neither free nor of a chain.
    InflightNext,
    /// A batch of completions that comes back to a head of its own; an entry of a packed ring's region that is in two
    /// places.
    InflightLoop,
    /// Two chains in flight that were taken at the same time, or one at the end of time.
    InflightCounter,
    /// More in flight than the driver made available.
    InflightTooMany,
    /// A page that was written and that the log of written pages has no bit for.
    LogTooSmall,
    /// The used index ran ahead by more than what is outstanding.
    UsedIndexJump,
    /// A used element that names no outstanding request.
    UsedIdUnknown,
    /// A used length above the writable size of its request.
    UsedLength,
    /// A link's index that its ring cannot have.
    LinkIndex,
    /// A link's message whose size does not fit.
    LinkMessageSize,
    /// An event whose source is out of range.
    EventSourceOutOfRange,
    /// An event ring whose slots were written over before they were taken.
    EventRingOverrun,
}

impl Rule {
    /// The stable name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RegionEmpty => "region-empty",
            Self::RegionWraps => "region-wraps",
            Self::RegionOverlaps => "region-overlaps",
            Self::RegionOutsideFile => "region-outside-file",
            Self::RegionReadOnly => "region-read-only",
            Self::RegionUnknown => "region-unknown",
            Self::RegionLost => "region-lost",
            Self::TooManyRegions => "too-many-regions",
            Self::TooMuchMemory => "too-much-memory",
            Self::AddressOutsideMemory => "address-outside-memory",
            Self::QueueSize => "queue-size",
            Self::RingMisaligned => "ring-misaligned",
            Self::RingOutsideMemory => "ring-outside-memory",
            Self::RingPosition => "ring-position",
            Self::IndexJump => "index-jump",
            Self::DescriptorOutOfRange => "descriptor-out-of-range",
            Self::DescriptorLoop => "descriptor-loop",
            Self::ChainTooLong => "chain-too-long",
            Self::ChainTooLarge => "chain-too-large",
            Self::ReadableAfterWritable => "readable-after-writable",
            Self::ZeroLengthDescriptor => "zero-length-descriptor",
            Self::DescriptorInUse => "descriptor-in-use",
            Self::DescriptorNotAvailable => "descriptor-not-available",
            Self::TooManyBuffers => "too-many-buffers",
            Self::IndirectNotNegotiated => "indirect-not-negotiated",
            Self::IndirectNested => "indirect-nested",
            Self::IndirectNext => "indirect-next",
            Self::IndirectTableSize => "indirect-table-size",
            Self::IndirectTableTooLong => "indirect-table-too-long",
            Self::BufferTooSmall => "buffer-too-small",
            Self::InflightMisaligned => "inflight-misaligned",
            Self::InflightSize => "inflight-size",
            Self::InflightVersion => "inflight-version",
            Self::InflightFeatures => "inflight-features",
            Self::InflightUsedIndex => "inflight-used-index",
            Self::InflightNext => "inflight-next",
            Self::InflightLoop => "inflight-loop",
            Self::InflightCounter => "inflight-counter",
            Self::InflightTooMany => "inflight-too-many",
            Self::LogTooSmall => "log-too-small",
            Self::UsedIndexJump => "used-index-jump",
            Self::UsedIdUnknown => "used-id-unknown",
            Self::UsedLength => "used-length",
            Self::LinkIndex => "link-index",
            Self::LinkMessageSize => "link-message-size",
            Self::EventSourceOutOfRange => "event-source-out-of-range",
            Self::EventRingOverrun => "event-ring-overrun",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The other side broke a rule of a ring, of the memory or of a link. Never a defect of this side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {detail}")]
pub struct Violation {
    /// Which rule.
    pub rule: Rule,
    /// What was seen, for people.
    pub detail: String,
}

impl Violation {
    /// A broken rule and what was seen of it. Out of line: it never happens on a good ring.
    #[cold]
    pub fn new(rule: Rule, detail: impl Into<String>) -> Self {
        Self { rule, detail: detail.into() }
    }

    /// The stable name of the rule.
    pub fn name(&self) -> &'static str {
        self.rule.name()
    }
}
