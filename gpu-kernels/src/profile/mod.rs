//! **profile** classifies heads: it finds which mask suits each (Sparse VideoGen, section 4.1).
//!
//! It computes attention of some sampled rows, dense and under each candidate mask.
//! [`select`](crate::select) compares the results and chooses.
//!
//! A block takes 64 sampled rows of one head and one split of its key tiles. It computes the
//! weights of a tile once, relative to an offset common to all masks. It multiplies them with V
//! once for dense attention and once for each mask, whose hidden keys get a weight of zero. Keys
//! lie in the spatial layout. There a row sees nearly every tile whole or not at all through the
//! spatial mask. Through the temporal one it sees a run of each frame. Grid: x = splits of the key
//! tiles, y = groups of 64 samples, z = batch x heads.
//!
//! On Hopper the producers say which keys a sample sees ([`producer`]). A consumer warpgroup
//! ([`consumer`]) has registers for three outputs of 64 columns. With head dim 128 both work on
//! every tile, each on half of V's columns. With head dim 64 they take turns on the tiles, and the
//! first merges in what the second has. Other GPUs have a body of their own ([`sm80`]), with the
//! same samples and results.
//!
//! A mask may hide keys whose scores lie so far above the visible ones that weights relative to all
//! keys lose the visible ones. Where
//! [`Dtype::least_masked_sum`](framestride_shapes::dtype::Dtype::least_masked_sum) says so for any
//! sample, the block goes over its tiles again for that mask. It then hides keys before the
//! softmax, so that the offsets are the mask's own. For that reason each mask's results carry their
//! offsets.

mod consumer;
mod producer;
mod results;
mod samples;
pub mod sm80;

use core::ops::Range;

use crate::cuda::barrier::{self, Barrier, Slot};
use crate::cuda::mma::Descriptor;
use crate::cuda::{shared, thread, warp};
use crate::masks::{CANDIDATES, each_candidate};
use crate::model::{Hopper, Model, sampled_video_row, valid_text};
use consumer::consume;
use framestride_shapes::blocks::{
    PROFILE_COLUMNS as COLUMNS, PROFILE_CONSUMERS as CONSUMERS, PROFILE_KEY_ROWS as KEY_ROWS, PROFILE_THREADS,
    SAMPLE_ROWS, WARPGROUP, profile_stages,
};
use framestride_shapes::layout::HeadType;
use framestride_shapes::params::ProfileParams;
use producer::Producer;

/// Bytes that say which keys of a tile a sample sees, a bit for each key and candidate mask.
const SEEN_BYTES: u32 = HeadType::CANDIDATES.len() as u32 * KEY_ROWS / 8;
/// Producer warps that look through one candidate mask. Each lane has a sample.
const WARPS_OF_CANDIDATE: u32 = SAMPLE_ROWS / 32;
const PRODUCER_REGISTERS: u32 = 24;
const CONSUMER_REGISTERS: u32 = 240;
/// Numbers of masks, as in the partial results. A sweep over the tiles has the number of the mask
/// that it is for. The first one, for all keys, gives the results of all candidates too.
const DENSE: u32 = HeadType::Dense as u32;
const MASKS: u32 = HeadType::ALL.len() as u32;

/// The number of a candidate mask.
#[inline(always)]
const fn number(candidate: usize) -> u32 {
    HeadType::CANDIDATES[candidate] as u32
}

/// How a block divides its work, and where its tiles and its words about samples lie.
struct Map<M>(core::marker::PhantomData<M>);

impl<M: Model> Map<M> {
    const STAGES: u32 = profile_stages(M::IMAGE);
    /// Whether the consumer warpgroups take turns on the tiles. If not, they share the columns of
    /// each.
    const TURNS: bool = M::HEAD_DIM == COLUMNS;
    /// Warps that read a tile. As many have results in the end.
    const READERS: u32 = if Self::TURNS { 4 } else { CONSUMERS * 4 };

    #[inline(always)]
    fn query_image() -> Descriptor {
        Descriptor::image(shared::address(M::PROFILE_SHARED.query, 0), M::ATOMS_BYTES)
    }

    #[inline(always)]
    fn key_image(slot: Slot) -> Descriptor {
        Descriptor::image(shared::address(M::PROFILE_SHARED.key, slot.stage), M::ATOMS_BYTES)
    }

    /// The value tile in a slot, from column 64 x `columns` on.
    #[inline(always)]
    fn value_image(slot: Slot, columns: u32) -> Descriptor {
        let column = M::IMAGE.chunk(0, columns * (COLUMNS / 8));
        Descriptor::image(shared::address(M::PROFILE_SHARED.value, slot.stage) + column, M::ATOMS_BYTES)
    }

    /// Where the producers say which keys a sample sees
    /// ([`Visible::keys`](framestride_shapes::layout::Visible::keys)): a u64 for each candidate
    /// mask.
    #[inline(always)]
    fn seen(stage: u32, sample: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.seen, stage) + sample * SEEN_BYTES
    }

    /// Where the consumers leave the sum of a sample's weights under a candidate mask, for the
    /// producers.
    #[inline(always)]
    fn masked_sum(candidate: u32, sample: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.masked_sum, candidate * SAMPLE_ROWS + sample)
    }
}

/// The body of **profile**.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, and `params` is as its
/// documentation says.
#[inline(always)]
pub unsafe fn profile<M: Hopper>(params: &ProfileParams) {
    let (split, group, head) = (thread::block_x(), thread::block_y(), thread::block_z());
    let thread_warp = thread::warp();
    let valid_text = valid_text::<M>(params.before_lengths, params.after_lengths, head / params.heads).sum();
    let end = valid_text + M::layout().video_tokens();
    let tiles = block_tiles(params, split, end);

    if thread::index() == 0 {
        let mut stage = 0;
        while stage < Map::<M>::STAGES {
            Barrier::at(M::PROFILE_SHARED.key_full, stage).init(1 + 4);
            Barrier::at(M::PROFILE_SHARED.value_full, stage).init(1);
            Barrier::at(M::PROFILE_SHARED.free, stage).init(Map::<M>::READERS);
            stage += 1;
        }
        Barrier::at(M::PROFILE_SHARED.swept, 0).init(32 * Map::<M>::READERS);
        Barrier::at(M::PROFILE_SHARED.judged, 0).init(4);
        barrier::publish_initialised();
    }
    thread::sync_block();

    if thread_warp < 4 {
        thread::release_registers::<PRODUCER_REGISTERS>();
        Producer::new::<M>(params, thread_warp, [group, head], valid_text).run::<M>(params, head, tiles);
    } else {
        thread::take_registers::<CONSUMER_REGISTERS>();
        // Meanwhile the first tiles are on their way.
        const THREADS: u32 = CONSUMERS * WARPGROUP;
        let thread = thread::index() - (PROFILE_THREADS - THREADS);
        let query = shared::address(M::PROFILE_SHARED.query, 0);
        samples::copy::<M>(params, [group, head], query, [thread, THREADS]);
        shared::publish_to_async();
        thread::sync_two_warpgroups();
        consume::<M>(params, thread_warp - 4, [split, group, head], valid_text, tiles);
    }
}

/// The key tiles of a split of the launch, of keys that end at packed row `end`.
#[inline(always)]
fn block_tiles(params: &ProfileParams, split: u32, end: u32) -> Range<u32> {
    let first = params.first_key / KEY_ROWS;
    let tiles = end.min(params.end_key).div_ceil(KEY_ROWS).saturating_sub(first);
    // Splits differ by one tile at most.
    let (share, rest) = (tiles / thread::blocks_x(), tiles % thread::blocks_x());
    let first_tile = first + split * share + split.min(rest);
    first_tile..first_tile + share + (split < rest) as u32
}

/// Which masks have lost something, a bit each, for all threads of the block.
///
/// # Safety
/// The producers judge the sums.
#[inline(always)]
unsafe fn lost_masks<M: Model>() -> u32 {
    Barrier::at(M::PROFILE_SHARED.judged, 0).wait(0);
    let verdicts = shared::load16(shared::address(M::PROFILE_SHARED.verdict, 0));
    let mut lost = 0;
    each_candidate(
        #[inline(always)]
        |candidate| lost |= (verdicts[2 * candidate] | verdicts[2 * candidate + 1]) << number(candidate),
    );
    warp::uniform(lost)
}

/// The sweep that follows the one for `mask`. It is [`MASKS`] when there is none.
#[inline(always)]
fn next_sweep(mask: u32, lost: u32) -> u32 {
    let mut next = MASKS;
    each_candidate(
        #[inline(always)]
        |candidate| {
            let later = number(candidate);
            if next == MASKS && mask < later && lost & (1 << later) != 0 {
                next = later;
            }
        },
    );
    next
}

/// The row of the video, frame-major, that is a sample of a group.
#[inline(always)]
fn sampled_row<M: Model>(params: &ProfileParams, head: u32, group: u32, sample: u32) -> u32 {
    sampled_video_row::<M>(params.seed, head, group * SAMPLE_ROWS + sample)
}
