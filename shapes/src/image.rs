//! Where the bytes of a packed image lie. `no_std`.
//!
//! **pack** writes Q, K and V of each head as an **image**: the form in which tensor cores read a
//! matrix from shared memory. Rows that begin at a multiple of [`ATOM_ROWS`] are a tile, and a tile
//! is copied to shared memory as it lies.
//!
//! An image consists of **atoms** of 8 rows by 128 bytes, which are 64 elements of two bytes. The
//! atoms of rows 0 to 7 come first, from left to right, then those of rows 8 to 15. With head dim
//! 128 they are
//!
//! ```text
//!               columns 0..64   columns 64..128
//! rows 0..8        atom 0           atom 1
//! rows 8..16       atom 2           atom 3
//! ```
//!
//! In an atom a row is 128 contiguous bytes, eight **chunks** of 16. Chunk c of row r stands at
//! place c ^ r, so that one chunk of all eight rows lies in different banks (PTX ISA, 128-byte
//! swizzle mode):
//!
//! ```text
//! place    0  1  2  3  4  5  6  7
//! row 0    0  1  2  3  4  5  6  7
//! row 1    1  0  3  2  5  4  7  6
//! row 2    2  3  0  1  6  7  4  5    ... and so on to row 7
//! ```

use crate::dtype::Dtype;

/// Rows of an atom. Packed rows are copied and addressed in multiples of it.
pub const ATOM_ROWS: u32 = 8;

/// Bytes of one row of an atom.
const ATOM_ROW_BYTES: u32 = 128;

/// Bytes of an atom. Tiles in shared memory are aligned to it.
pub const ATOM_BYTES: u32 = ATOM_ROWS * ATOM_ROW_BYTES;

/// Bytes of a chunk: what a lane loads and stores at once.
pub const CHUNK_BYTES: u32 = 16;

const ATOM_CHUNKS: u32 = ATOM_ROW_BYTES / CHUNK_BYTES;

/// The rows that an image consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Elements of a row: 64 or 128.
    pub head_dim: u32,
    /// Their type.
    pub dtype: Dtype,
}

impl Image {
    /// Bytes of so many rows.
    #[inline(always)]
    pub const fn bytes(self, rows: u32) -> u32 {
        rows * self.head_dim * self.dtype.bytes()
    }

    /// Elements of a chunk.
    #[inline(always)]
    pub const fn chunk_elements(self) -> u32 {
        CHUNK_BYTES / self.dtype.bytes()
    }

    /// Chunks of a row.
    #[inline(always)]
    pub const fn row_chunks(self) -> u32 {
        self.bytes(1) / CHUNK_BYTES
    }

    /// Byte of the image at which chunk `chunk` of row `row` begins.
    #[inline(always)]
    pub const fn chunk(self, row: u32, chunk: u32) -> u32 {
        let (atom_row, row) = (row / ATOM_ROWS, row % ATOM_ROWS);
        let atom = atom_row * (self.row_chunks() / ATOM_CHUNKS) + chunk / ATOM_CHUNKS;
        atom * ATOM_BYTES + row * ATOM_ROW_BYTES + ((chunk % ATOM_CHUNKS) ^ row) * CHUNK_BYTES
    }
}

/// The images of attention in 8 bits. Rows have 128 elements of one byte.
///
/// Q and K are images as above, one atom wide. **pack** has multiplied each 8 neighbouring channels
/// of both by one orthogonal matrix, which leaves the products of rows as they are.
///
/// The image of V is transposed, since a product of 8-bit elements reads both operands along the
/// keys. It consists of **units** of 16 keys. A unit has 16 bytes for each channel, one for each
/// key:
///
/// ```text
/// byte            0  1  2  3   4  5  6  7   8  9 10 11  12 13 14 15
/// key of the unit 0  1  8  9   2  3 10 11   4  5 12 13   6  7 14 15
/// ```
///
/// In this order, the four bytes of a lane as an operand are keys whose scores the same lane holds
/// ([`fragment`](crate::fragment)).
pub mod e4m3 {
    use super::{ATOM_BYTES, ATOM_ROW_BYTES, ATOM_ROWS, CHUNK_BYTES};

    /// Bytes of a row of Q or K, and of all channels of a key of V.
    pub const ROW_BYTES: u32 = ATOM_ROW_BYTES;

    /// Keys of a unit. Tiles begin at multiples of it.
    pub const UNIT_KEYS: u32 = 16;

    /// Bytes of a unit.
    pub const UNIT_BYTES: u32 = UNIT_KEYS * ROW_BYTES;

    /// Words of the **center** of a head. The first 128 are f32, the mean of each channel of V.
    pub const CENTER_FLOATS: u32 = 260;

    /// Index in a center of the factor, f32, by which V was multiplied after its mean had been
    /// subtracted. One over it follows.
    pub const CENTER_FACTOR: u32 = 128;

    /// Index in a center of 128 signed integers. Each is what rounding took from a channel of all
    /// keys together, multiplied by the factor and by [`LOST_SCALE`].
    pub const CENTER_LOST: u32 = 132;

    /// Index in a center of the largest value, f32, multiplied by the factor, of which is counted
    /// what rounding took: 8 to 16 times the root mean square. Larger ones are few, and what they
    /// lose is no property of a channel. With a bound that usual values exceed, what is left out
    /// has a mean.
    pub const CENTER_COUNTED: u32 = 130;

    /// The integers count in units of one over this. Values of a usual size lose less than 1/2, so
    /// 2^24 keys do not overflow.
    pub const LOST_SCALE: f32 = 64.0;

    /// Bytes of so many rows, which are whole units in V.
    #[inline(always)]
    pub const fn bytes(rows: u32) -> u32 {
        rows.next_multiple_of(UNIT_KEYS) * ROW_BYTES
    }

    /// Byte of an image of Q or K at which chunk `chunk` of row `row` begins.
    #[inline(always)]
    pub const fn chunk(row: u32, chunk: u32) -> u32 {
        let (atom, row) = (row / ATOM_ROWS, row % ATOM_ROWS);
        atom * ATOM_BYTES + row * ATOM_ROW_BYTES + (chunk ^ row) * CHUNK_BYTES
    }

    /// Byte of an image of V that has channel `channel` of key `key`.
    #[inline(always)]
    pub const fn value(key: u32, channel: u32) -> u32 {
        let (unit, key) = (key / UNIT_KEYS, key % UNIT_KEYS);
        unit * UNIT_BYTES + channel * UNIT_KEYS + (key % 8 / 2 * 4 + key / 8 * 2 + key % 2)
    }
}
