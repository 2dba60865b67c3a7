/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the two sides of a bus must agree upon: the shared area, the event rings and the messages,
 * as they are laid out in memory. docs/protocol.md of the project is the definition; the names here
 * are its names.
 *
 * Everything is little-endian. Whatever the device's side writes is read once (READ_ONCE, or a
 * copy) and checked.
 */
#ifndef VBUS_WIRE_H
#define VBUS_WIRE_H

#include <linux/bits.h>
#include <linux/types.h>

/* The shared area. */

#define VBUS_AREA_MAGIC		0x0031616572616276ULL
#define VBUS_AREA_VERSION	1
#define VBUS_AREA_PAGE		4096
#define VBUS_AREA_MAX		(64UL << 20)
#define VBUS_PRIORITIES		8
#define VBUS_SHARDS		1
#define VBUS_MAX_SOURCES	65536
/* The last sources of an area are those of its channels, one a priority. */
#define VBUS_CHANNEL_SOURCES	VBUS_PRIORITIES

#define VBUS_LINK_BYTES		65536
#define VBUS_REGION_ALIGN	65536
#define VBUS_REGIONS_BYTES	(16U << 20)

struct vbus_area_events {
	__le64 slots;
	__le64 stats;
	__le64 taken;
	__le64 sleep;
};

struct vbus_area_header {
	__le64 magic;
	__le32 version;
	__le32 header_bytes;
	__le64 total;
	__le32 priorities;
	__le32 shards;
	__le32 max_sources;
	__le32 link_bytes;
	__le64 link_to_device;
	__le64 link_to_driver;
	struct vbus_area_events to_device;
	struct vbus_area_events to_driver;
	__le64 channels_to_device;
	__le64 channels_to_driver;
	__le64 regions;
	__le64 regions_bytes;
};

/* One direction of a link. Both counters run freely. */
struct vbus_link_ring {
	__le32 tail;		/* bytes put in, written by the producer */
	u8 pad0[60];
	__le32 head;		/* bytes taken out, written by the consumer */
	u8 pad1[60];
	u8 data[VBUS_LINK_BYTES];
};

/*
 * One event. The producer writes it; the sequence number, which is one more than its position,
 * comes last.
 */
struct vbus_slot {
	__le32 sequence;
	__le32 source;
	__le32 generation;
	__le32 zero;
};

/* What the producer of a source counts, for people. */
struct vbus_stats {
	__le64 signalled;
	__le64 sent;
	__le64 rung;
	__le64 zero;
};

/* Odd while the consumer of this priority sleeps. */
struct vbus_sleep {
	__le32 word;
	u8 pad[60];
};

/* Messages. */

#define VBUS_MSG_RESPONSE	BIT(0)
#define VBUS_MSG_BUS		BIT(1)

struct vbus_msg {
	u8 type;
	u8 id;
	__le16 dev_num;
	__le16 token;
	__le16 size;		/* of the whole message */
};

#define VBUS_REVISION		1
/*
 * The largest message that this side takes, and sends: a quarter of what would fit into half of a
 * ring, and twice what a channel's event wants.
 */
#define VBUS_MAX_MSG		8192
#define VBUS_NAME_MAX		63

/* About a device. */
#define VBUS_GET_DEVICE_INFO	0x02
#define VBUS_GET_FEATURES	0x03
#define VBUS_SET_FEATURES	0x04
#define VBUS_GET_CONFIG		0x05
#define VBUS_SET_CONFIG		0x06
#define VBUS_GET_STATUS		0x07
#define VBUS_SET_STATUS		0x08
#define VBUS_GET_VQUEUE		0x09
#define VBUS_SET_VQUEUE		0x0a
#define VBUS_RESET_VQUEUE	0x0b
#define VBUS_EVENT_CONFIG	0x40

/* Of the bus: VBUS_MSG_BUS is set. */
#define VBUS_GET_DEVICES	0x02
#define VBUS_PING		0x03
#define VBUS_EVENT_DEVICE	0x40
#define VBUS_HELLO		0x80
#define VBUS_NAME		0x83
#define VBUS_SOURCES		0x84
#define VBUS_RELEASE		0x85
#define VBUS_CHANNEL_OPEN	0x86
#define VBUS_CHANNEL_CLOSE	0x87
#define VBUS_NEXT_CHANNEL	0x8b
#define VBUS_RAM_RANGE		0x8c
#define VBUS_RAM_PROOF		0x8d
#define VBUS_USE_MEMORY		0x8e
#define VBUS_CHANNEL_EVENT	0xc4
#define VBUS_ERROR		0xc5
#define VBUS_EVENT_CHANNELS	0xc6
#define VBUS_CHANNEL_CLOSED	0xc7
#define VBUS_CHANNEL_CREDIT	0xc8

struct vbus_device_info {
	__le32 device_id;
	__le32 vendor_id;
	__le32 num_feature_bits;
	__le32 config_size;
	__le32 max_virtqueues;
	__le16 admin_vq_start;
	__le16 admin_vq_count;
};

struct vbus_features {
	__le32 block_index;
	__le32 num_blocks;
	__le32 features[2];
};

struct vbus_config_range {
	__le32 offset;
	__le32 length;
};

struct vbus_config {
	__le32 generation;
	__le32 offset;
	__le32 length;
};

struct vbus_index {
	__le32 index;
};

struct vbus_vqueue {
	__le32 index;
	__le32 max_size;	/* 0 in SET_VQUEUE */
	__le32 size;
	__le32 zero;
	__le64 desc;
	__le64 driver;
	__le64 device;
};

struct vbus_event_config {
	__le32 status;
	__le32 generation;
	__le32 offset;
	__le32 length;
};

struct vbus_devices {
	__le16 offset;
	__le16 count;
};

struct vbus_devices_found {
	__le16 offset;
	__le16 count;
	__le16 next_offset;
};

#define VBUS_DEVICE_READY	1
#define VBUS_DEVICE_REMOVED	2

struct vbus_event_device {
	__le16 dev_num;
	__le16 state;
};

struct vbus_hello {
	__le32 revision;
	__le32 max_msg_size;
	__le32 flags;
};

/* A flag of HELLO: this side can prove where its memory is. */
#define VBUS_HELLO_RAM		BIT(0)

#define VBUS_MEMORY_SHARED	0
#define VBUS_MEMORY_WINDOW	1

#define VBUS_SIGNAL_DIRECT	0
#define VBUS_SIGNAL_TUNNELLED	1

/* Names follow: a length, then so many bytes. */
struct vbus_hello_answer {
	__le32 revision;
	__le32 max_msg_size;
	u8 memory_kind;
	u8 signal_kind;
	u8 priorities;
	u8 shards;
	__le32 max_sources;
	__le32 max_request;
	u8 uuid[16];
	u8 name_length;
	u8 name[VBUS_NAME_MAX];
} __packed;

struct vbus_name_answer {
	u8 uuid[16];
	u8 name_length;
	u8 name[VBUS_NAME_MAX];
};

/* A priority a queue follows. */
struct vbus_sources {
	__le32 first_source;
	__le32 generation;
};

struct vbus_ram_range {
	__le32 index;
	__le32 count;
	__le64 address;
	__le64 size;
	__le64 nonce;
};

struct vbus_ram_proof {
	__le32 index;
	__le32 zero;
	__le64 address;
};

struct vbus_use_memory {
	__le32 memory_kind;
};

/* Channels. */

#define VBUS_MAX_EVENT		4096
#define VBUS_EVENT_COST		64
#define VBUS_WINDOW		16384

struct vbus_next_channel {
	u8 name_length;
	u8 name[VBUS_NAME_MAX];
};

struct vbus_next_channel_answer {
	u8 priority;
	u8 zero[3];
	__le32 memory;
	struct vbus_next_channel name;
};

/* A name follows. */
struct vbus_channel_open {
	u8 priority;
	u8 flags;
	__le16 zero;
	__le32 memory;
	__le32 channel;
};

struct vbus_channel_open_answer {
	u8 priority;
	u8 zero[3];
	__le32 window;
	__le64 memory_offset;
	__le64 memory_size;
};

/* In CHANNEL_EVENT, bytes follow; in CHANNEL_CLOSED, text. */
struct vbus_channel_number {
	__le32 channel;
};

struct vbus_channel_credit {
	__le32 channel;
	__le32 consumed;
};

struct vbus_error {
	__le32 errno_;
	u8 message;
	u8 zero[3];
};

#endif
