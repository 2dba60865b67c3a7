//! Load generators, and bare references that rings are measured against.
//!
//! Nothing here serves anybody: it is what `vbus bench` runs where Python in a loop would be what is measured. Every
//! loop counts and sums up what it did, so that two sides can be compared before a figure is believed.

pub mod bare;
pub mod frames;
pub mod load;
pub mod pingpong;
pub mod reads;
pub mod wait;
pub mod work;
