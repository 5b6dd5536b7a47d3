//! **attention**: O = softmax(scale Q K^T) V over the visible pairs of each head.
//!
//! Blocks are persistent: each takes the next query tile when it is done with one ([`order`] says
//! which). What a query tile is, and what it sees, stands in [`work`] and [`masks`](crate::masks).
//!
//! On Hopper ([`sm90`]) a block has the structure of FlashAttention-3 (section 3). One producer
//! warpgroup copies tiles into shared memory, and `query_rows / 64` consumer warpgroups have 64 rows
//! of the query tile each. For each a consumer does:
//!
//! ```text
//! from the first tile j, and again from a tile whose weights are too large for the rows' offsets:
//!     S = Q K[j]^T;  lower the offsets, unless rows may do without;  rescale O;  P = weights of S
//!     for each tile j after it:
//!         start S = offsets + Q K[j]^T
//!         start O += P V[j-1]
//!         wait for S;  S = weights of S             (while O += P V runs on the tensor cores)
//!         wait for O;  P = S
//! O += P V of the last tile;  O / sum -> the model's order
//! ```
//!
//! In 8 bits ([`sm90::attention_e4m3`]), each tile has weights of an offset of its own, and products
//! with V of an accumulator of its own.
//!
//! On other GPUs ([`sm80`]) a block has the structure of FlashAttention-2 (section 3). Every warp
//! copies and has rows of its own, and does the same with products that are done when they return.
//! What other warps of its multiprocessor do fills the time that it waits.
//!
//! The last line is [`store`]'s.

mod order;
pub mod sm80;
pub mod sm90;
mod store;
mod work;
