//! What a driver leaves undone, done for one that does not take it so: checksums, and cutting what is longer than a
//! packet (virtio 1.4, section 5.1.6.2).

use crate::net::Fields;

/// Bytes of a frame by which it can be seen what it is: an Ethernet header with two tags, the longest header of IPv4 or
/// one of IPv6 with extensions, and the longest of TCP.
pub const HEAD: usize = 192;
/// Segments that one frame is cut into at most: with 64 bytes each, the longest.
pub const SEGMENTS: usize = 1024;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// gso_type without its flag of ECN.
const KIND: u8 = 0x7f;
const TCPV4: u8 = 1;
const TCPV6: u8 = 4;
const UDP_L4: u8 = 5;
/// Flags of TCP.
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Where the headers are of a frame that is to be cut, which is what its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Where IP's begins.
    network: usize,
    /// Where TCP's or UDP's begins.
    transport: usize,
    /// Bytes of all headers.
    pub headers: usize,
    /// Bytes of a segment.
    size: usize,
    version: u8,
    protocol: u8,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

impl Cut {
    /// How a frame of `size` bytes that begins so is cut; None when it is not what it is said to be, has nothing to cut,
    /// or would become too many.
    pub fn of(head: &[u8], size: usize, said: Fields) -> Option<Self> {
        let (mut at, mut kind) = (12, word(head, 12)?);
        for _ in 0..TAGS.len() {
            if TAGS.contains(&kind) {
                at += 4;
                kind = word(head, at)?;
            }
        }
        let network = at + 2;
        let (kind_of_ip, wanted, offset) = match said.gso & KIND {
            TCPV4 => (Some(IPV4), TCP, 16),
            TCPV6 => (Some(IPV6), TCP, 16),
            UDP_L4 => (None, UDP, 6),
            _ => return None,
        };
        if kind_of_ip.is_some_and(|wanted| wanted != kind) {
            return None;
        }
        let (version, transport, protocol) = match kind {
            IPV4 => {
                let first = *head.get(network)?;
                let length = usize::from(first & 15) * 4;
                // One that is a fragment already is cut no more.
                if first >> 4 != 4 || length < 20 || word(head, network + 6)? & 0x3fff != 0 {
                    return None;
                }
                (4, network + length, *head.get(network + 9)?)
            }
            IPV6 if head.get(network)? >> 4 == 6 => {
                let (transport, protocol) = behind_extensions(head, network)?;
                (6, transport, protocol)
            }
            _ => return None,
        };
        let sum = (usize::from(said.start), usize::from(said.offset));
        if protocol != wanted || sum != (transport, offset) {
            return None;
        }
        let headers = match protocol {
            TCP => transport + usize::from(*head.get(transport + 12)? >> 4) * 4,
            _ => transport + 8,
        };
        let shortest = transport + if protocol == TCP { 20 } else { 8 };
        let segment = usize::from(said.gso_size);
        if headers < shortest || headers >= size || headers > head.len() || segment == 0 {
            return None;
        }
        let cut = Self { network, transport, headers, size: segment, version, protocol };
        (cut.count(size) <= SEGMENTS).then_some(cut)
    }

    /// How many segments a frame of `size` bytes has.
    pub fn count(&self, size: usize) -> usize {
        (size - self.headers).div_ceil(self.size)
    }

    /// Call with each segment, as a finished frame.
    pub fn each(&self, frame: &[u8], segment: &mut Vec<u8>, mut each: impl FnMut(&[u8])) {
        let (headers, payload) = frame.split_at(self.headers);
        let count = self.count(frame.len());
        for (index, part) in payload.chunks(self.size).enumerate() {
            segment.clear();
            segment.extend_from_slice(headers);
            segment.extend_from_slice(part);
            self.number(segment, index, index + 1 == count);
            each(segment);
        }
    }

    /// Make headers say that this is the `index`th segment.
    fn number(&self, segment: &mut [u8], index: usize, last: bool) {
        let length = segment.len();
        let (network, transport) = (self.network, self.transport);
        if self.version == 4 {
            put(segment, network + 2, (length - network) as u16);
            let id = word(segment, network + 4).unwrap_or_default().wrapping_add(index as u16);
            put(segment, network + 4, id);
            put(segment, network + 10, 0);
            put(segment, network + 10, !fold(sum(&segment[network..transport])));
        } else {
            put(segment, network + 4, (length - network - 40) as u16);
        }
        let field = if self.protocol == TCP {
            let at = transport + 4;
            let number = u32::from_be_bytes(std::array::from_fn(|byte| segment[at + byte]));
            let number = number.wrapping_add((index * self.size) as u32);
            segment[at..at + 4].copy_from_slice(&number.to_be_bytes());
            let flags = &mut segment[transport + 13];
            if !last {
                *flags &= !(FIN | PSH);
            }
            if index > 0 {
                *flags &= !CWR;
            }
            transport + 16
        } else {
            put(segment, transport + 4, (length - transport) as u16);
            transport + 6
        };
        let addresses = if self.version == 4 { network + 12..network + 20 } else { network + 8..network + 40 };
        let pseudo = sum(&segment[addresses]) + u64::from(self.protocol) + (length - transport) as u64;
        put(segment, field, fold(pseudo));
        finish(segment, transport, field - transport);
    }
}

/// Where what IPv6 carries begins, and what it is.
fn behind_extensions(head: &[u8], network: usize) -> Option<(usize, u8)> {
    let (mut at, mut next) = (network + 40, *head.get(network + 6)?);
    // Hop-by-hop options, routing, destination options. It ends, as each of them has bytes of the head.
    while [0, 43, 60].contains(&next) {
        next = *head.get(at)?;
        at += (usize::from(*head.get(at + 1)?) + 1) * 8;
    }
    Some((at, next))
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Finish the checksum over all bytes from `start`, which is kept `offset` bytes behind. Both are inside.
pub fn finish(frame: &mut [u8], start: usize, offset: usize) {
    let value = match !fold(sum(&frame[start..])) {
        // 0 would say that there is none; in this arithmetic it is the same.
        0 => 0xffff,
        value => value,
    };
    put(frame, start + offset, value);
}

/// The sum of big-endian words, not yet folded; an odd byte is followed by a zero.
fn sum(bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    let mut total = 0u64;
    for chunk in chunks.by_ref() {
        total += u64::from(u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let mut rest = [0; 4];
    rest[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    total += u64::from(u32::from_ne_bytes(rest));
    // It may be added up in any order of bytes, as long as that is one.
    u64::from(u16::from_be(fold(total)))
}

fn fold(mut total: u64) -> u16 {
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}
