//! Matrix products: what the generated fragments and products offer.
//!
//! Which element of an accumulator each register holds is said in
//! [`fragment`](framestride_shapes::fragment). Those of a warpgroup (9.7.15, wgmma) take
//! descriptors of operands. A warpgroup is four warps, and the number of the first is divisible by
//! four.

use core::arch::asm;

use super::math;
use framestride_shapes::image::{ATOM_BYTES, ATOM_ROWS, Image, e4m3};

/// A tile of an [image](framestride_shapes::image) in shared memory, as an operand of products.
#[derive(Clone, Copy)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// The tile at `address`, which is aligned to an atom. `atoms_bytes` are the bytes of a row of
    /// atoms, all columns of 8 rows.
    ///
    /// Q and K are used with rows as M or N and columns as K (K-major). V is used with rows as K
    /// and columns as N (MN-major). Both need the same fields. The stride offset leads to the next
    /// row of atoms. The leading offset, which is read only when MN-major, leads to the next atom.
    #[inline(always)]
    pub fn image(address: u32, atoms_bytes: u32) -> Descriptor {
        const SWIZZLE_128: u64 = 1 << 62;
        let row_stride = (atoms_bytes / 16) as u64;
        let column_stride = (ATOM_BYTES / 16) as u64;
        Descriptor((address as u64 & 0x3_ffff) >> 4 | column_stride << 16 | row_stride << 32 | SWIZZLE_128)
    }

    /// The tile of V at `address`, in the image of [`e4m3`]: K-major without a swizzle. The leading
    /// offset leads to the next unit of keys, and the stride offset to the next 8 channels.
    #[inline(always)]
    pub fn values_e4m3(address: u32) -> Descriptor {
        const UNIT: u64 = (e4m3::UNIT_BYTES / 16) as u64;
        const CHANNELS: u64 = (8 * e4m3::UNIT_KEYS / 16) as u64;
        Descriptor((address as u64 & 0x3_ffff) >> 4 | UNIT << 16 | CHANNELS << 32)
    }
}

/// The registers of one thread in an accumulator. The macros of products make them, each a named
/// field: an array with indices may be left on the stack, where no asynchronous product can reach
/// it.
pub trait Fragment: Copy {
    /// A fragment in which every value is the same.
    fn splat(value: f32) -> Self;

    /// Calls `f(index, value)` for every value. The calls are unrolled, so the index is a constant
    /// wherever it is used.
    fn for_each(&mut self, f: impl FnMut(u32, &mut f32));

    /// Calls `f(index, value, other value)` for every value and that of `other`, likewise.
    fn for_each_with(&mut self, other: &Self, f: impl FnMut(u32, &mut f32, f32));

    /// Calls `f(group, values)` for the four values of each group of 8 columns, likewise.
    fn for_each_group(&mut self, f: impl FnMut(u32, [&mut f32; 4]));
}

/// What the two products of a flash-attention step over a key tile work on, for one element type,
/// tile size and head dim.
pub trait Products {
    /// S, which has query rows by the keys of a tile.
    type Scores: Fragment;
    /// P in the element type, as the A operand of the second product. A register has several
    /// values.
    type Weights: Copy;
    /// O, which has query rows by the columns of V that the products take.
    type Output: Fragment;

    /// Rounds weights, which stand where the scores were.
    fn weights(scores: &Self::Scores) -> Self::Weights;

    /// The weights of the thread's rows, each and-ed with a word of the row. All ones keep a row,
    /// and 0 makes it zero.
    fn and_rows(weights: &Self::Weights, rows: [u32; 2]) -> Self::Weights;
}

/// Weights of 8 bits.
pub trait ByteWeights: Products {
    /// Makes weights and rounds them. `weight(index, score)` is the weight of the score in register
    /// `index`.
    fn weigh(scores: &Self::Scores, weight: impl FnMut(u32, f32) -> f32) -> Self::Weights;
}

/// The products of a warpgroup, of 64 query rows. `tile_products!` makes them.
///
/// Each is one group (fence, k-steps, commit). Nothing is complete until a wait.
pub trait TileProducts: Products {
    /// Starts S += Q K^T. Where `scores` are constant zeros, ptxas sees it, and the first k-step
    /// reads no registers.
    ///
    /// # Safety
    /// The whole warpgroup comes here. The images are complete and stay until the wait, and
    /// `scores` is not touched until then.
    unsafe fn start_scores(scores: &mut Self::Scores, q: Descriptor, k: Descriptor);

    /// Waits until at most `PENDING` of the warpgroup's groups of products are in flight. The
    /// scores may be touched from here on.
    ///
    /// # Safety
    /// The whole warpgroup comes here.
    unsafe fn wait_scores<const PENDING: u32>(scores: &mut Self::Scores);

    /// Starts O += P V, or in 8 bits O = P V. `v` begins at the first of the columns.
    ///
    /// # Safety
    /// As for `start_scores`. Neither `output` nor `weights` is touched until the wait.
    unsafe fn start_output(output: &mut Self::Output, weights: &Self::Weights, v: Descriptor);

    /// Waits for all products. Both operands in registers are free then.
    ///
    /// # Safety
    /// The whole warpgroup comes here.
    unsafe fn wait_output(output: &mut Self::Output, weights: &mut Self::Weights);
}

/// A tile of an [image](framestride_shapes::image) in shared memory, as a warp loads 8 x 8 matrices
/// of it (9.7.14.5.15, ldmatrix): the address of the row that this lane names, of the first four.
#[derive(Clone, Copy)]
pub struct Matrices(u32);

impl Matrices {
    /// Q, or V transposed, whose tile lies at `address`, from chunk `first` of its rows on. Of four
    /// matrices the second lies below the first, and the other two beside these.
    #[inline(always)]
    pub fn by_rows(address: u32, image: Image, first: u32, lane: u32) -> Matrices {
        Matrices(address + image.chunk(lane % 16, first + lane / 16))
    }

    /// K, whose tile lies at `address`. Of four matrices the second lies beside the first, and the
    /// other two below these.
    #[inline(always)]
    pub fn by_columns(address: u32, image: Image, lane: u32) -> Matrices {
        Matrices(address + image.chunk(lane / 16 * ATOM_ROWS + lane % ATOM_ROWS, lane / 8 % 2))
    }

    /// The same of a tile that lies `bytes` behind.
    #[inline(always)]
    pub fn behind(self, bytes: u32) -> Matrices {
        Matrices(self.0 + bytes)
    }

    /// The same, but the compiler does not compute addresses from it before a loop
    /// ([`math::opaque`]).
    #[inline(always)]
    pub fn opaque(self) -> Matrices {
        Matrices(math::opaque(self.0))
    }

    /// Loads four matrices: those that lie `ATOM` bytes behind the first, with bits `CHUNK` of the
    /// address turned. Each lane gets two neighbours of a row of each.
    ///
    /// # Safety
    /// All 32 lanes come here. The tile is there.
    #[inline(always)]
    pub unsafe fn load<const ATOM: u32, const CHUNK: u32>(self) -> [u32; 4] {
        let (a, b, c, d): (u32, u32, u32, u32);
        asm!(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{} + {}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.0 ^ CHUNK, const ATOM,
            options(nostack)
        );
        [a, b, c, d]
    }

    /// The same of transposed matrices: each lane gets two neighbours of a column.
    ///
    /// # Safety
    /// As for [`Matrices::load`].
    #[inline(always)]
    pub unsafe fn load_transposed<const ATOM: u32, const CHUNK: u32>(self) -> [u32; 4] {
        let (a, b, c, d): (u32, u32, u32, u32);
        asm!(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{} + {}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.0 ^ CHUNK, const ATOM,
            options(nostack)
        );
        [a, b, c, d]
    }
}

/// The products of a warp (9.7.14.5, mma.sync), which has 16 query rows in each of its blocks.
/// `warp_products!` makes them.
pub trait WarpProducts<const BLOCKS: usize>: Products {
    /// O += P V. `v` begins at the first of the columns.
    ///
    /// # Safety
    /// All 32 lanes come here. The tile is there.
    unsafe fn add_output(output: &mut [Self::Output; BLOCKS], weights: &[Self::Weights; BLOCKS], v: Matrices);
}

/// Products of a warp of **attention**.
pub trait WarpScores<const BLOCKS: usize>: WarpProducts<BLOCKS> {
    /// The query rows: in registers with head dim 64, and where they lie in shared memory with 128.
    type Queries: Copy;

    /// The query rows. `q` begins at the warp's first.
    ///
    /// # Safety
    /// As for [`WarpProducts::add_output`].
    unsafe fn queries(q: Matrices) -> Self::Queries;

    /// S += Q K^T.
    ///
    /// # Safety
    /// As for [`WarpProducts::add_output`]. With head dim 128, the query rows are still there.
    unsafe fn add_scores(scores: &mut [Self::Scores; BLOCKS], queries: Self::Queries, k: Matrices);
}

/// Products of a warp of **profile**, whose 16 query rows stay in registers. It weighs all 64 keys
/// of a tile, or has a **twin**, a warp with the same rows. Then each weighs 32, and gets the
/// weights of the other half from its twin. `warp_products!` makes them.
pub trait SampleProducts: Products {
    /// The query rows, in registers.
    type Queries: Copy;

    /// Loads the query rows.
    ///
    /// # Safety
    /// All 32 lanes come here. The tile is there.
    unsafe fn queries(q: Matrices) -> Self::Queries;

    /// S = Q K^T, and `start` is added to the rows. `k` begins at the first key that the warp
    /// weighs.
    ///
    /// # Safety
    /// As for [`SampleProducts::queries`].
    unsafe fn sample_scores(scores: &mut Self::Scores, start: [f32; 2], queries: &Self::Queries, k: Matrices);

    /// The weights of keys that the thread's rows see, a bit for each key that the warp weighs.
    /// Others become zero.
    fn keep_seen(weights: &Self::Weights, seen: [u64; 2], lane: u32) -> Self::Weights;

    /// Stores the weights for the twin at `to`, in
    /// [`HALF_WEIGHTS_BYTES`](framestride_shapes::shared::HALF_WEIGHTS_BYTES).
    ///
    /// # Safety
    /// All 32 lanes come here. The place is in the block's shared memory, and nobody reads it now.
    unsafe fn store_weights(weights: &Self::Weights, to: u32, lane: u32);

    /// Loads weights that the twin has stored.
    ///
    /// # Safety
    /// As for [`SampleProducts::store_weights`]. A barrier stands between the two.
    unsafe fn load_weights(from: u32, lane: u32) -> Self::Weights;
}

/// Both products, beside each other.
pub trait BothProducts<const BLOCKS: usize>: SampleProducts + WarpProducts<BLOCKS> {
    /// O += P V, as [`WarpProducts::add_output`], and S += Q K^T, as
    /// [`SampleProducts::sample_scores`]. Their loads take turns, so that products of one need not
    /// wait for loads of the other.
    ///
    /// # Safety
    /// As for both.
    unsafe fn add_both(
        output: &mut [Self::Output; BLOCKS],
        weights: &[Self::Weights; BLOCKS],
        v: Matrices,
        scores: &mut Self::Scores,
        start: [f32; 2],
        queries: &Self::Queries,
        k: Matrices,
    );
}
