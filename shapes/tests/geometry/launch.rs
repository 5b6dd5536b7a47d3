//! **pack** fits a multiprocessor, whatever the heads.

use framestride_shapes::launch::{PACK_STEP_BYTES, pack_held_steps, pack_min_blocks, pack_shared_bytes, pack_warps};

use crate::shipped;

#[test]
fn pack_holds_whole_rows_of_the_shipped_shapes() {
    for spec in shipped() {
        let held = pack_held_steps(spec.heads, spec.head_dim) * PACK_STEP_BYTES;
        assert_eq!(held, (spec.heads * spec.head_dim * 2).next_multiple_of(PACK_STEP_BYTES), "{}", spec.name);
    }
}

#[test]
fn blocks_of_pack_fit_a_multiprocessor() {
    for head_dim in [64, 128] {
        for heads in 1..=65535 {
            let (steps, shared) = (pack_held_steps(heads, head_dim), pack_shared_bytes(heads, head_dim));
            // A lane has one bit for each step.
            assert!((1..=32).contains(&steps), "{heads} heads of {head_dim}: {steps} steps");
            let (warps, blocks) = (pack_warps(heads, head_dim), pack_min_blocks(heads, head_dim));
            assert_eq!(shared, warps * steps * PACK_STEP_BYTES);
            assert!(
                (16..=32).contains(&(warps * blocks)),
                "{heads} heads of {head_dim}: {blocks} blocks of {warps} warps"
            );
            let kib = (blocks * (shared + 1024)).div_ceil(1024);
            assert!(kib <= 228, "{heads} heads of {head_dim}: {blocks} blocks take {kib} KiB");
        }
    }
}
