//! Driver memory, split rings, event rings and link rings: the parts of vbus that run once per descriptor or per event.
