//! What `attention_kernels!` states of a spec, and what follows from it.
//!
//! What decides which instructions multiply is a constant. Everything else is a number, which is a
//! constant when kernels are compiled for one spec, and a literal in a template
//! ([`Numbers`](framestride_shapes::numbers)). So no array has a size, and no loop is unrolled, by
//! such a number.

use crate::cuda::global;
use crate::cuda::mma::{BothProducts, ByteWeights, Products, TileProducts, WarpScores};
use crate::element::Element;
use crate::masks::CANDIDATES;
use framestride_shapes::blocks::{SELECT_THREADS, Tiles, WARP_BLOCKS};
use framestride_shapes::dtype::Compute;
use framestride_shapes::image::{ATOM_ROWS, Image, e4m3};
use framestride_shapes::layout::{Layout, ValidText};
use framestride_shapes::numbers::Numbers;
use framestride_shapes::params::PartialsLayout;
use framestride_shapes::shared::{AttentionShared, PackShared, ProfileShared, SelectShared};

/// The attention layers of one model, as its spec declares them.
pub trait Model {
    /// The numbers of the spec.
    fn numbers() -> Numbers;

    /// 64 or 128.
    const HEAD_DIM: u32;
    /// Tiles of the attention kernel.
    const TILES: Tiles;
    /// What **attention** multiplies.
    const COMPUTE: Compute;
    /// bf16 or f16.
    type Element: Element;
    /// Products of the attention kernel, on key tiles of `TILES.key_rows`.
    type Attention: Products;
    /// Products of the profile kernel, on key tiles of
    /// [`PROFILE_KEY_ROWS`](framestride_shapes::blocks::PROFILE_KEY_ROWS), or on halves of them.
    type Profile: Products;

    /// The rows of packed Q, K and V.
    const IMAGE: Image = Image { head_dim: Self::HEAD_DIM, dtype: Self::Element::DTYPE };
    /// Bytes of a row of the images that **attention** reads.
    const ROW_BYTES: u32 = match Self::COMPUTE {
        Compute::Dtype => Self::IMAGE.bytes(1),
        Compute::E4m3 => e4m3::ROW_BYTES,
    };
    /// Bytes of a row of atoms of the image.
    const ATOMS_BYTES: u32 = Self::IMAGE.bytes(ATOM_ROWS);
    /// The shared memory of **profile**.
    const PROFILE_SHARED: ProfileShared = ProfileShared::new(Self::IMAGE);
    /// The shared memory of **select**.
    const SELECT_SHARED: SelectShared = SelectShared::new(SELECT_THREADS);
    /// The shared memory of **attention**.
    const ATTENTION_SHARED: AttentionShared = AttentionShared::new(Self::TILES, Self::ROW_BYTES, Self::COMPUTE);

    /// Frames, text, sinks, half widths.
    #[inline(always)]
    fn layout() -> Layout {
        Self::numbers().layout()
    }

    /// Rows from the image of one head, as **attention** reads it, to that of the next.
    #[inline(always)]
    fn image_rows() -> u32 {
        match Self::COMPUTE {
            Compute::Dtype => Self::layout().packed_rows(),
            Compute::E4m3 => Self::numbers().e4m3_image_rows,
        }
    }

    /// Whether a head multiplies in this model's precision. `head` counts in `precisions`, which is
    /// 0 where all heads do.
    ///
    /// # Safety
    /// `precisions` is 0, or holds a u32 for the head.
    #[inline(always)]
    unsafe fn has_head(precisions: u64, head: u32) -> bool {
        precisions == 0
            || Compute::of_bits(global::load_u32(precisions + head as u64 * 4)) as u32 == Self::COMPUTE as u32
    }

    /// The shared memory of **pack**.
    #[inline(always)]
    fn pack_shared() -> PackShared {
        let Numbers { pack_threads, pack_held_steps, .. } = Self::numbers();
        PackShared::new(pack_threads / 32, pack_held_steps)
    }

    /// Bytes from the image of one head, as **attention** reads it, to that of the next.
    #[inline(always)]
    fn image_bytes() -> u64 {
        (Self::image_rows() * Self::ROW_BYTES) as u64
    }

    /// How the partial results of profiling lie, with the keys of a head in `splits` parts.
    #[inline(always)]
    fn partials(splits: u32) -> PartialsLayout {
        Self::numbers().partials(Self::HEAD_DIM, splits)
    }
}

/// A model whose products are those of Hopper.
pub trait Hopper: Model<Attention: TileProducts, Profile: TileProducts> {}

impl<M: Model<Attention: TileProducts, Profile: TileProducts>> Hopper for M {}

/// A model of Hopper whose attention multiplies 8 bits.
pub trait HopperE4m3: Hopper<Attention: ByteWeights> {}

impl<M: Hopper<Attention: ByteWeights>> HopperE4m3 for M {}

/// A model whose products are those of single warps, which all GPUs since Ampere have.
pub trait Ampere:
    Model<Attention: WarpScores<WARP_BLOCKS>, Profile: BothProducts<1> + BothProducts<2> + BothProducts<{ 1 + CANDIDATES }>>
{
}

impl<M> Ampere for M where
    M: Model<
            Attention: WarpScores<WARP_BLOCKS>,
            Profile: BothProducts<1> + BothProducts<2> + BothProducts<{ 1 + CANDIDATES }>,
        >
{
}

/// The row of the video, frame-major, that is sample `index` of a head. Samples beyond the last
/// repeat it.
#[inline(always)]
pub fn sampled_video_row<M: Model>(seed: u64, head: u32, index: u32) -> u32 {
    let samples = M::numbers().profile_rows;
    M::layout().sampled_video_row(seed, head, index.min(samples.value - 1), samples)
}

/// Valid text tokens of a batch item, given the addresses of those before the video and of those
/// after it. They are at most the text there is, whatever memory says.
///
/// # Safety
/// An address is 0 or holds a u32 for the item.
#[inline(always)]
pub unsafe fn valid_text<M: Model>(before_lengths: u64, after_lengths: u64, batch_item: u32) -> ValidText {
    #[inline(always)]
    unsafe fn valid(all: u32, lengths: u64, batch_item: u32) -> u32 {
        if all == 0 || lengths == 0 { all } else { global::load_u32(lengths + batch_item as u64 * 4).min(all) }
    }
    let Numbers { before_tokens, after_tokens, .. } = M::numbers();
    ValidText {
        before: valid(before_tokens, before_lengths, batch_item),
        after: valid(after_tokens, after_lengths, batch_item),
    }
}
