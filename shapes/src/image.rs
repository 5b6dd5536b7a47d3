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
    /// All that kernels exist for.
    pub const ALL: [Image; 4] = [
        Image { head_dim: 64, dtype: Dtype::Bf16 },
        Image { head_dim: 64, dtype: Dtype::F16 },
        Image { head_dim: 128, dtype: Dtype::Bf16 },
        Image { head_dim: 128, dtype: Dtype::F16 },
    ];

    /// The name of the template whose packed rows are these, such as `bf16_128`.
    #[cfg(feature = "std")]
    pub fn name(self) -> String {
        format!("{}_{}", self.dtype.as_str(), self.head_dim)
    }

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
