//! What `attention_kernels!` states of a spec, as constants that the kernels are compiled for, and
//! what follows from them.

use crate::cuda::global;
use crate::cuda::mma::TileProducts;
use crate::element::Element;
use framestride_shapes::blocks::{PackBlock, SAMPLE_ROWS, SELECT_THREADS, Tiles};
use framestride_shapes::image::{ATOM_ROWS, Image};
use framestride_shapes::layout::Layout;
use framestride_shapes::norm_rope::{QkNorm, Rope};
use framestride_shapes::params::PartialsLayout;
use framestride_shapes::shared::{AttentionShared, PackShared, ProfileShared, SelectShared};

/// The attention layers of one model, as its spec declares them.
pub trait Model {
    /// Frames, text, sinks, half widths.
    const LAYOUT: Layout;
    /// Heads of the model: the extent of a norm over all heads.
    const HEADS: u32;
    /// 64 or 128.
    const HEAD_DIM: u32;
    /// QK-norm.
    const QK_NORM: Option<QkNorm>;
    /// Rotary embedding.
    const ROPE: Option<Rope>;
    /// Sampled rows a head.
    const PROFILE_ROWS: u32;
    /// Tiles of the attention kernel.
    const TILES: Tiles;
    /// bf16 or f16.
    type Element: Element;
    /// Products of the attention kernel, on key tiles of `TILES.key_rows`.
    type Attention: TileProducts<Element = Self::Element>;
    /// Products of the profile kernel, on key tiles of
    /// [`PROFILE_KEY_ROWS`](framestride_shapes::blocks::PROFILE_KEY_ROWS).
    type Profile: TileProducts<Element = Self::Element>;

    /// The rows of packed Q, K and V.
    const IMAGE: Image = Image { head_dim: Self::HEAD_DIM, dtype: Self::Element::DTYPE };
    /// Bytes of a row of atoms of the image.
    const ATOMS_BYTES: u32 = Self::IMAGE.bytes(ATOM_ROWS);
    /// A block of **pack**.
    const PACK: PackBlock = PackBlock::new(Self::HEADS, Self::IMAGE);
    /// The shared memory of **pack**.
    const PACK_SHARED: PackShared = PackShared::new(Self::PACK.warps, Self::PACK.held_steps);
    /// The shared memory of **profile**.
    const PROFILE_SHARED: ProfileShared = ProfileShared::new(Self::IMAGE);
    /// The shared memory of **select**.
    const SELECT_SHARED: SelectShared = SelectShared::new(SELECT_THREADS);
    /// The shared memory of **attention**.
    const ATTENTION_SHARED: AttentionShared = AttentionShared::new(Self::TILES, Self::IMAGE);

    /// How the partial results of profiling lie, with the keys of a head in `splits` parts.
    #[inline(always)]
    fn partials(splits: u32) -> PartialsLayout {
        let groups = Self::PROFILE_ROWS.div_ceil(SAMPLE_ROWS);
        PartialsLayout { rows: Self::PROFILE_ROWS, groups, splits, head_dim: Self::HEAD_DIM }
    }
}

/// Valid text tokens of a batch item; at most the text there is, whatever memory says.
///
/// # Safety
/// `text_lengths` is 0 or holds a u32 for the item.
#[inline(always)]
pub unsafe fn valid_text<M: Model>(text_lengths: u64, batch_item: u32) -> u32 {
    if M::LAYOUT.text_tokens == 0 || text_lengths == 0 {
        M::LAYOUT.text_tokens
    } else {
        global::load_u32(text_lengths + batch_item as u64 * 4).min(M::LAYOUT.text_tokens)
    }
}
