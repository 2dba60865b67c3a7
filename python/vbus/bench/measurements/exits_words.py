"""What the page of exits says: each step in words, and the figures in sentences."""

from __future__ import annotations

from typing import Any

from vbus.bench.guest_side import PCI, TUNNELLED

Row = dict[str, Any]

HEAD = """\
# Exits

How often a guest and its devices have to interrupt each other for the same work, measured by `vbus bench exits`. This
page is generated (`vbus bench report`) from the JSON beside it; the sentences before the figures are by hand.

## Where exits come from

A guest runs on a processor until something makes it leave. Two things of each request do:

1. **The doorbell.** The driver lays a request into its ring, which is memory, and then writes to a register of the
   device: "look at this queue". The write cannot be done by the guest: the processor leaves it, the hypervisor finds
   the eventfd that belongs to the address, and whoever serves the queue wakes up. That is an exit, a system call, and
   the waking of a thread.
2. **The interrupt.** The device lays its answer into the ring and writes to another eventfd; the hypervisor injects an
   interrupt. A processor that runs the guest is made to leave for that, one that sleeps is woken; the guest leaves what
   it does, runs a handler, and ends the interrupt.

What is not paid twice is cheaper the second time: if the other side is awake already, it needs to be told nothing. All
the ways below differ in how well they know that.

## What each way does about it

- **virtio-pci over vhost-user** has an eventfd and a vector for each queue. With **EVENT_IDX**, which all ways
  negotiate here, each side writes into the ring how far it has come, and the other rings only when that place is
  passed. So while a queue's driver is busy with answers of this queue, more of them need no interrupt; while its device
  is still taking requests, more of them need no doorbell. It knows nothing of other queues: sixteen disks with one
  request each are sixteen interrupts, because each of those queues is empty when it is answered.
- **`ivshmem`, direct** has the same devices behind one function. Buffers are where the guest has them, as behind
  vhost-user: what differs is how the two sides tell each other that there is something to do. There is the same rule
  for each queue, with the bus's doorbells in place of the device's own: one a priority and direction; sixteen disks
  share the vector, so that the guest's processor merges interrupts that come while one is handled. From here to
  tunnelled signals, the tunnel alone makes the difference.
- **`ivshmem`, tunnelled** puts an *event*, which names the queue, into a ring of shared memory; a queue has at most one
  there. Only when the consumer of that ring sleeps, which a word beside the ring says, the producer rings, once for
  this sleep. So whatever comes while the other side is awake costs neither a doorbell nor an interrupt, of whichever
  device it is.
- **tunnelled, copying** is the same for a guest that shares no memory: it copies what devices shall see into the
  function's memory and back, which takes time of the guest's, and more of an emulated one's.

**NAPI** is what keeps the guest awake for a while: the interrupt takes the first events at once and leaves the consumer
awake; a poll in softirq goes on, and comes back until it finds nothing. Only then the consumer says that it sleeps,
looks once more, and is due for an interrupt again. Nobody spins: the poll ends with the first look that finds nothing.
On the device's side the same is done by the scheduler, which drains the event rings between any two turns, and sleeps
when there is nothing to do.

**Priorities** are a ring, a sleep word and a vector each, so that something urgent does not queue behind bulk, and is
heard when only bulk is masked by being awake. That costs: a consumer that is awake for bulk is still rung for something
urgent. Here all devices have the same priority, which is what these counts are of.

**Speed decides.** Whoever is faster sleeps more often: a bus that has answered before the guest has laid down its next
request is asleep again, and has to be woken by a doorbell; a guest that is done with an answer before the next is there
has to be interrupted. Then there is nothing to be saved, and each request costs one of each, whatever the way. So
the counts below stand beside what the disks served, from a tenth of what the guest asks for to all of it. (Each disk
takes a random time for a read, with an average that gives this, so that disks do not answer in step.)

Doorbells remain where the bus sleeps: requests that find nobody awake ring, and a bus that is faster than its guest is
asleep most of the time. (That one thread serves in place of two made no difference when it was tried; polling would
make one, is paid in CPU time, and is not done here.) So with sixteen disks doorbells are near a quarter, and above it
with the deepest queues. It is not that a queue signals more often: with sixteen reads of each disk under way, one
notification is for sixteen of them already, on virtio-pci as well, and only batches of different disks can still share
one.

The guest cannot hold a doorbell back until its own poll comes by. Drivers may spin until the device answers, as
virtio_net does for its control queue; where they do, no poll comes by, and the doorbell never rings.

CPU time is that of the load alone, of QEMU, which here runs the guest's instructions, and of the bus. A way that saved
signals by spinning would show in it: tunnelled, it is 0.72 to 1.10 times virtio-pci's.

In 2009, on the hardware of that time, tunnelling saved 11% of the interrupts of one network stream, and exits went from
65,000 a second to 36,000.
"""


def words(result: Row) -> str:
    """The figures in sentences."""
    paragraphs = [
        "Interrupts are those that the guest's kernel counted in `/proc/interrupts`. Doorbells are counted where they "
        "are heard: on virtio-pci they are the sum of each queue's eventfd, behind ivshmem what the modules count in "
        "`to_device/rung`. Both are given a request: a read of 4 KiB, a question of 64 bytes and its answer, or 64 KiB "
        "of a stream. One process serves all devices with the same models and the same threads, which do not poll: "
        "disks in Python, since their service time is set, and networks by the engine of taps. The same count of "
        "requests is done by each way, in turns."
    ]
    rows = [row for row in result["comparisons"] if row["of"]["signal"] == TUNNELLED and row["bars"]]
    for row in rows:
        case = row["case"]
        if case["work"] == "read" and case["offered"] == "full" and case["devices"] == _most(rows):
            paragraphs.append(_of_many(row) + _busy(result, case))
    paragraphs.append(_losses(rows))
    return "\n\n".join(paragraphs)


def _busy(result: Row, case: Row) -> str:
    """How much of the time the bus had something to do, when signals were tunnelled."""
    for row in result["rows"]:
        if row["case"] == case and row["variant"]["signal"] == TUNNELLED:
            share = row["median"]["cpu_us_bus"] * row["median"]["per_second"] / 1e6
            return f" The bus is busy {share:.0%} of the time."
    return ""


def _losses(rows: list[Row]) -> str:
    """Bars that are missed beside virtio-pci, and what does not count."""
    missed = [
        f"{_name(row['case'])}: "
        + ", ".join(f"{bar['what']} {bar['ratio']:.2f}x" for bar in row["bars"])
        + f", where at most {row['bars'][0]['limit']:g}x was wanted"
        for row in rows
        if row["counts"] and not all(bar["met"] for bar in row["bars"])
    ]
    void = [f"{_name(row['case'])}: {', '.join(row['why'])}" for row in rows if not row["counts"]]
    parts = [
        f"Where we lose beside {PCI}:\n\n" + "\n".join(f"- {line}" for line in missed)
        if missed
        else f"Of what counts, no bar is missed beside {PCI}."
    ]
    if void:
        lines = "\n".join(f"- {line}" for line in void)
        parts.append(f"What does not count beside {PCI}, since it was paid for elsewhere:\n\n{lines}")
    return "\n\n".join(parts)


def _most(rows: list[Row]) -> int:
    return max((row["case"]["devices"] for row in rows if row["case"]["work"] == "read"), default=0)


def _of_many(row: Row) -> str:
    case, ratios = row["case"], row["ratios"]
    return (
        f"*{case['devices']} disks, {case['depth']} {'reads' if case['depth'] > 1 else 'read'} of each under way*: "
        f"tunnelled, a read takes {_times(ratios['interrupts'])} the interrupts and {_times(ratios['doorbells'])} the "
        f"doorbells of {PCI}, with {_times(ratios['per_second'])} its reads a second, "
        f"{_times(ratios['p99_us'])} its 99th percentile and {_times(ratios['cpu_us'])} its CPU time."
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} times"


def _name(case: Row) -> str:
    one, many = {"read": ("disk", "disks"), "ask": ("network", "networks"), "stream": ("network", "networks")}[
        case["work"]
    ]
    what = {"read": "reads", "ask": "questions", "stream": "streams"}[case["work"]]
    offered = "" if case["offered"] == "full" else f", disks serve {case['offered']}"
    return f"{case['devices']} {one if case['devices'] == 1 else many}, {what}, {case['depth']} at once{offered}"
