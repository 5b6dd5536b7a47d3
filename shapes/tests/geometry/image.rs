//! Packed images, against a formula of their own: this test is the judge of the one that kernels,
//! host and macros use.

use framestride_shapes::dtype::Dtype;
use framestride_shapes::image::{ATOM_BYTES, ATOM_ROWS, Image, e4m3};

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

/// Rows of 128 bytes under the same swizzle, and V by units of 16 keys.
#[test]
fn images_of_8_bits() {
    for row in 0..32 {
        for chunk in 0..8 {
            let plain = row / 8 * 1024 + row % 8 * 128 + chunk * 16;
            assert_eq!(e4m3::chunk(row, chunk), plain ^ (plain >> 7 & 7) << 4, "row {row}, chunk {chunk}");
        }
    }
    let mut taken = vec![false; e4m3::bytes(40) as usize];
    assert_eq!(taken.len(), 48 * 128);
    for key in 0..48 {
        for channel in 0..128 {
            // A lane of a quad has columns 2t and 2t + 1 of each 8 scores. As an operand it has four
            // bytes in a row, those of the first 8 columns first.
            let (column, lane) = (key % 16, key % 8 / 2);
            let place = 4 * lane + 2 * (column / 8) + column % 2;
            let byte = key / 16 * 2048 + channel * 16 + place;
            assert_eq!(e4m3::value(key, channel), byte, "key {key}, channel {channel}");
            assert!(!core::mem::replace(&mut taken[byte as usize], true), "key {key}, channel {channel}");
        }
    }
    assert!(taken.iter().all(|taken| *taken));
}
