//! **pack** fits a multiprocessor, whatever the heads. Every block's shared memory is within the
//! family's.

use framestride_shapes::arch::Arch;
use framestride_shapes::blocks::{PACK_STEP_BYTES, PackBlock};
use framestride_shapes::dtype::Dtype;
use framestride_shapes::image::Image;
use framestride_shapes::shared::{AttentionShared, PackShared, ProfileShared};

use crate::shipped;

#[test]
fn pack_holds_whole_rows_of_the_shipped_shapes() {
    for spec in shipped() {
        let held = PackBlock::new(Arch::default(), spec.heads, spec.image()).held_steps * PACK_STEP_BYTES;
        assert_eq!(held, (spec.heads * spec.head_dim * 2).next_multiple_of(PACK_STEP_BYTES), "{}", spec.name);
    }
}

#[test]
fn blocks_of_pack_fit_a_multiprocessor() {
    for head_dim in [64, 128] {
        for heads in 1..=65535 {
            let PackBlock { held_steps: steps, warps, min_blocks: blocks } =
                PackBlock::new(Arch::default(), heads, Image { head_dim, dtype: Dtype::Bf16 });
            let shared = PackShared::new(warps, steps).bytes;
            // A lane has one bit for each step.
            assert!((1..=32).contains(&steps), "{heads} heads of {head_dim}: {steps} steps");
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

/// Sizes as they were measured with, and places that do not overlap.
#[test]
fn shared_memory_of_attention_and_profile() {
    for (head_dim, attention_bytes, profile_bytes) in [(64, 156_672, 218_112), (128, 214_016, 220_160)] {
        let image = Image { head_dim, dtype: Dtype::Bf16 };
        let tiles = framestride_shapes::blocks::Tiles::new(Arch::default(), head_dim);
        let (attention, profile) = (AttentionShared::new(tiles, image), ProfileShared::new(image));
        assert_eq!((attention.bytes, profile.bytes), (attention_bytes, profile_bytes));
        assert!(attention.bytes.max(profile.bytes) <= Arch::SM_90A.block_shared_bytes);
        let (rows, stages) = (image.bytes(1), tiles.stages);
        assert_eq!(attention.key.at(0), attention.query.at(tiles.consumers()));
        assert_eq!(attention.value.at(0), attention.key.at(stages));
        assert_eq!(attention.value.at(stages), attention.bytes);
        assert!(attention.value_free.at(stages) <= attention.work.at(0));
        assert!(attention.work.at(tiles.consumers()) <= attention.query.at(0));
        assert_eq!(profile.value.at(0), profile.key.at(0) + 64 * rows);
        assert_eq!(profile.key.at(1), profile.value.at(0) + 64 * rows);
        assert!(profile.judged.at(1) <= profile.verdict.at(0) && profile.verdict.at(4) <= profile.masked_sum.at(0));
        assert!(profile.masked_sum.at(2 * 64) <= profile.query.at(0));
    }
}
