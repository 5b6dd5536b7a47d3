//! Warpgroup matrix products (9.7.15, wgmma): operand descriptors, and what the generated fragments and products offer.
//!
//! A warpgroup is four warps, the first of a number divisible by four. An m64nN accumulator lies in registers: thread t holds, for
//! each group g of 8 columns, four values: columns 8 g + 2 (t % 4) and the next, of rows r and r + 8, with
//! r = 16 (t / 32) + (t % 32) / 4 (t counted in the warpgroup). In a [`Fragment`] value 4 g + 2 i + j is row r + 8 i,
//! column 8 g + 2 (t % 4) + j.

/// Bytes from 8 rows of 64 two-byte elements to the next such block: one 128-byte-swizzle atom.
pub const ATOM_BYTES: u32 = 1024;

/// A matrix in shared memory, as packed images have it: atoms of 8 rows by 64 columns; `head_dim / 64` of them beside each other,
/// then the next 8 rows.
#[derive(Clone, Copy)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Rows of the image from `address` (1024-byte aligned), used with its rows as M or N and its columns as K (K-major: Q and
    /// K), or with its rows as K and its columns as N (MN-major: V). Both need the same fields: the stride offset leads to the
    /// next 8 rows, the leading offset (read only when MN-major) to the next 64 columns.
    #[inline(always)]
    pub fn image(address: u32, head_dim: u32) -> Descriptor {
        const SWIZZLE_128: u64 = 1 << 62;
        let row_stride = (ATOM_BYTES * (head_dim / 64) / 16) as u64;
        let column_stride = (ATOM_BYTES / 16) as u64;
        Descriptor((address as u64 & 0x3_ffff) >> 4 | column_stride << 16 | row_stride << 32 | SWIZZLE_128)
    }
}

/// The registers of one thread in an m64nN accumulator, each a named field (an indexed array may be left on the stack, where
/// no asynchronous product can reach it). Made by `tile_products!`.
pub trait Fragment: Copy {
    /// Every value the same.
    fn splat(value: f32) -> Self;

    /// Calls `f(index, value)` for every value, unrolled: the index is a constant wherever it is used.
    fn for_each(&mut self, f: impl FnMut(u32, &mut f32));

    /// As `for_each`, on the four values of each group of 8 columns: `f(group, values)`.
    fn for_each_group(&mut self, f: impl FnMut(u32, [&mut f32; 4]));

    /// Waits until at most `PENDING` of the warpgroup's groups of products are in flight; the registers may be touched from here.
    ///
    /// # Safety
    /// The whole warpgroup comes here.
    unsafe fn wait<const PENDING: u32>(&mut self);
}

/// The two products of a flash-attention step over a key tile, for one element type, tile size and head dim. Made by
/// `tile_products!`. Both are one group: fence, k-steps, commit; nothing is complete until a wait.
pub trait TileProducts {
    /// bf16 or f16.
    type Element: crate::element::Element;
    /// S: 64 query rows by the keys of a tile.
    type Scores: Fragment;
    /// P in the element type, as the A operand of the second product: two values a register.
    type Weights: Copy;
    /// O: 64 query rows by the columns of V that the products take, all of them or 64.
    type Output: Fragment;

    /// Starts S += Q K^T. Where `scores` are constant zeros, ptxas sees it, and the first k-step reads no registers.
    ///
    /// # Safety
    /// The whole warpgroup comes here; the images are complete and stay until the wait; `scores` is not touched until then.
    unsafe fn start_scores(scores: &mut Self::Scores, q: Descriptor, k: Descriptor);

    /// Starts O += P V; `v` begins at the first of the columns.
    ///
    /// # Safety
    /// As for `start_scores`; neither `output` nor `weights` is touched until the wait.
    unsafe fn start_output(output: &mut Self::Output, weights: &Self::Weights, v: Descriptor);

    /// Waits for all products; releases both operands in registers.
    ///
    /// # Safety
    /// The whole warpgroup comes here.
    unsafe fn wait_output(output: &mut Self::Output, weights: &mut Self::Weights);

    /// Rounds scores to weights.
    fn weights(scores: &Self::Scores) -> Self::Weights;

    /// The weights of the thread's rows, each and-ed with the row's word: all ones keep a row, 0 makes it zero.
    fn and_rows(weights: &Self::Weights, rows: [u32; 2]) -> Self::Weights;
}
