//! Packed images, against a formula of their own: this test is the judge of the one that kernels,
//! host and macros use.

use framestride_shapes::dtype::Dtype;
use framestride_shapes::image::{ATOM_BYTES, ATOM_ROWS, Image};

#[test]
fn chunks_lie_as_the_128_byte_swizzle_has_them() {
    for head_dim in [64u32, 128] {
        let image = Image { head_dim, dtype: Dtype::Bf16 };
        assert_eq!((image.bytes(3), image.row_chunks(), image.chunk_elements()), (6 * head_dim, head_dim / 8, 8));
        let mut taken = vec![false; image.bytes(32) as usize / 16];
        for row in 0..32 {
            for chunk in 0..image.row_chunks() {
                // The hardware exchanges bits 4 to 6 of an address by bits 7 to 9.
                let column = chunk * 8;
                let plain = (row / 8 * (head_dim / 64) + column / 64) * 1024 + row % 8 * 128 + column % 64 * 2;
                let byte = plain ^ (plain >> 7 & 7) << 4;
                assert_eq!(image.chunk(row, chunk), byte, "row {row}, chunk {chunk}");
                assert!(!core::mem::replace(&mut taken[byte as usize / 16], true), "row {row}, chunk {chunk}");
            }
        }
    }
    assert_eq!((ATOM_ROWS, ATOM_BYTES), (8, 1024));
}
