//! The heads of one row, as the lanes of its warp see them. They are read once, and held in shared
//! memory.

use crate::cuda::{copy, global, shared, thread, warp};
use crate::model::Model;
use framestride_shapes::blocks::{GRID_Z, PACK_STEP_BYTES};
use framestride_shapes::layout::HeadType;

/// Lanes that share one head. Each has a chunk of it.
#[inline(always)]
fn head_lanes<M: Model>() -> u32 {
    M::IMAGE.row_chunks()
}

/// Heads that the warp takes in one step.
#[inline(always)]
pub fn heads_at_once<M: Model>() -> u32 {
    32 / head_lanes::<M>()
}

/// Which of a head's lanes this one is.
#[inline(always)]
pub fn chunk<M: Model>() -> u32 {
    thread::lane() % head_lanes::<M>()
}

/// No memory lies below it. One more than the number of a head is less.
pub const LEAST_ADDRESS: u64 = GRID_Z + 1;

/// The heads of one row, as a lane sees them. In each step it has 16 bytes of one head, beside
/// those that the other lanes have.
pub struct Heads {
    /// Number of heads in the launch.
    pub count: u32,
    /// Address of the lane's 16 bytes of the first step. `stride` are the bytes from one step to
    /// the next.
    pub source: u64,
    pub stride: u64,
    pub aligned: bool,
    /// Address of the item's head types. It is 0 when every head is packed in the spatial layout,
    /// because all are dense or not yet profiled.
    ///
    /// Below [`LEAST_ADDRESS`] it is one more than the number of the only head that is written.
    /// That has the spatial layout. A field of its own would take a register that ptxas has not.
    pub types: u64,
    /// Address of the item's precisions. It is 0 when heads of every precision are written.
    pub precisions: u64,
    /// Whether only temporal heads are written.
    pub only_temporal: bool,
    /// Whether the row is zero, whatever the tensor holds.
    pub blank: bool,
    /// Whether heads that are not written are read too.
    pub all_read: bool,
    /// The part of the row that is held in shared memory.
    pub held: Held,
}

/// The steps that are in shared memory, up to 32. Bit i of a mask is for step `first` + i.
pub struct Held {
    /// Shared address of the lane's 16 bytes of the first step.
    pub address: u32,
    pub first: u32,
    /// Steps whose head is temporal.
    pub temporal: u32,
    /// Steps whose head is written.
    pub written: u32,
    /// Steps whose head is read. Of the others nothing is held.
    pub read: u32,
}

/// A lane's part of one head.
pub struct Head {
    pub index: u32,
    pub temporal: bool,
    pub written: bool,
    pub read: bool,
    /// The eight elements. They are zero when they are not read.
    pub values: [u32; 4],
}

impl Heads {
    /// Calls `f` with every head. It is called equally often in all lanes.
    #[inline(always)]
    pub unsafe fn each<M: Model>(&mut self, mut f: impl FnMut(Head)) {
        let steps = self.count.div_ceil(heads_at_once::<M>());
        let mut first = 0;
        while first < steps {
            let count = M::numbers().pack_held_steps.min(steps - first);
            // They are still held from the last time if the whole row has room.
            if self.held.first != first {
                self.hold::<M>(first, count);
            }
            let held = &self.held;
            let mut index = head_of::<M>(first);
            let mut i = 0;
            while i < count {
                let is = |mask: u32| mask >> i & 1 != 0;
                let read = is(held.read);
                let values = if read { shared::load16(held.address + i * PACK_STEP_BYTES) } else { [0; 4] };
                f(Head { index, temporal: is(held.temporal), written: is(held.written), read, values });
                index += heads_at_once::<M>();
                i += 1;
            }
            first += count;
        }
    }

    /// Brings `count` steps from `first` on to shared memory.
    #[inline(always)]
    unsafe fn hold<M: Model>(&mut self, first: u32, count: u32) {
        let (mut present, mut temporal, mut chosen) = (0, 0, 0);
        let mut i = 0;
        while i < M::numbers().pack_held_steps {
            // Each lane of a head looks at another step.
            let head = head_of::<M>(first + i + chunk::<M>());
            let is_present = head < self.count;
            let is_temporal = is_present
                && self.types >= LEAST_ADDRESS
                && global::load_u32(self.types + head as u64 * 4) == HeadType::Temporal as u32;
            let is_chosen = is_present
                && (self.types == 0 || self.types >= LEAST_ADDRESS || self.types == head as u64 + 1)
                && M::has_head(self.precisions, head);
            let seen =
                |by_lane: u32| (by_lane >> (thread::lane() - chunk::<M>()) & ((1 << head_lanes::<M>()) - 1)) << i;
            present |= seen(warp::ballot(is_present));
            temporal |= seen(warp::ballot(is_temporal));
            chosen |= seen(warp::ballot(is_chosen));
            i += head_lanes::<M>();
        }
        let written = if self.only_temporal { temporal & chosen } else { chosen };
        let read = if self.all_read { present } else { written };
        self.held = Held { first, temporal, written, read: if self.blank { 0 } else { read }, ..self.held };

        if self.aligned {
            self.copy::<true>(count);
            copy::wait_started();
        } else {
            self.copy::<false>(count);
        }
    }

    /// Copies the lane's 16 bytes of each of `count` steps that is read. Copies of aligned rows are
    /// started, and must be waited for.
    #[inline(always)]
    unsafe fn copy<const ALIGNED: bool>(&self, count: u32) {
        let mut to = self.held.address;
        let mut from = self.source + self.held.first as u64 * self.stride;
        let mut i = 0;
        while i < count {
            if !ALIGNED {
                // Each round has eight loads, for whose results several rounds would find no
                // registers.
                thread::keep_rolled();
            }
            if self.held.read >> i & 1 != 0 {
                if ALIGNED {
                    copy::start16(to, from);
                } else {
                    shared::store16(to, global::load16_unaligned(from));
                }
            }
            to += PACK_STEP_BYTES;
            from += self.stride;
            i += 1;
        }
    }
}

/// The head that a step has in this lane. Where there is none, it is one behind the last or more.
#[inline(always)]
pub fn head_of<M: Model>(step: u32) -> u32 {
    step * heads_at_once::<M>() + thread::lane() / head_lanes::<M>()
}
