//! **pack** fits a multiprocessor, whatever the heads. Every block's shared memory is within the
//! family's.

use framestride_shapes::arch::Arch;
use framestride_shapes::blocks::{PACK_STEP_BYTES, PackBlock, Tiles, WARP_ROWS, holds_queries, profile_min_blocks};
use framestride_shapes::dtype::{Compute, Dtype};
use framestride_shapes::image::Image;
use framestride_shapes::shared::{AttentionShared, PackShared, ProfileShared, WarpAttentionShared, WarpProfileShared};

use crate::shipped;

#[test]
fn pack_holds_whole_rows_of_the_shipped_shapes() {
    for (arch, spec) in Arch::ALL.into_iter().flat_map(|arch| shipped().map(move |spec| (arch, spec))) {
        let held = PackBlock::new(arch, spec.heads, spec.image()).held_steps * PACK_STEP_BYTES;
        assert_eq!(held, (spec.heads * spec.head_dim * 2).next_multiple_of(PACK_STEP_BYTES), "{}", spec.name);
    }
}

#[test]
fn blocks_of_pack_fit_a_multiprocessor() {
    // A multiprocessor of Hopper has room for more rows.
    for (arch, least) in [(Arch::SM_90A, 16), (Arch::SM_80, 4)] {
        for (head_dim, heads) in
            [64, 128].into_iter().flat_map(|head_dim| (1..=65535).map(move |heads| (head_dim, heads)))
        {
            let PackBlock { held_steps: steps, warps, min_blocks: blocks } =
                PackBlock::new(arch, heads, Image { head_dim, dtype: Dtype::Bf16 });
            let shared = PackShared::new(warps, steps).bytes;
            let named = format!("{}, {heads} heads of {head_dim}: {blocks} blocks of {warps} warps", arch.name);
            // A lane has one bit for each step.
            assert!((1..=32).contains(&steps), "{named}: {steps} steps");
            assert_eq!(shared, warps * steps * PACK_STEP_BYTES);
            assert!((least..=32).contains(&(warps * blocks)), "{named}");
            assert!(blocks >= 1 && shared <= arch.block_shared_bytes, "{named}");
            assert!(blocks * (shared + arch.reserved_shared_bytes) <= arch.shared_bytes, "{named}");
        }
    }
}

/// Sizes as they were measured with, and places that do not overlap.
#[test]
fn shared_memory_of_attention_and_profile() {
    for (head_dim, attention_bytes, profile_bytes) in [(64, 172_032, 218_112), (128, 232_448, 220_160)] {
        let image = Image { head_dim, dtype: Dtype::Bf16 };
        let tiles = Tiles::new(Arch::SM_90A, head_dim, Compute::Dtype);
        let (attention, profile) =
            (AttentionShared::new(tiles, image.bytes(1), Compute::Dtype), ProfileShared::new(image));
        assert_eq!((attention.bytes, profile.bytes), (attention_bytes, profile_bytes));
        assert!(attention.bytes.max(profile.bytes) <= Arch::SM_90A.block_shared_bytes);
        let (rows, stages) = (image.bytes(1), tiles.stages);
        assert_eq!(attention.key.at(0), attention.query.at(tiles.consumers()));
        assert_eq!(attention.value.at(0), attention.key.at(stages));
        assert_eq!(attention.value.at(stages), attention.anchors.at(0));
        assert_eq!(attention.anchors.at(head_dim / 32), attention.anchor_sums.at(0));
        assert_eq!(attention.anchor_sums.at(2), attention.bytes);
        assert!(attention.value_free.at(stages) <= attention.work.at(0));
        assert!(attention.work.at(tiles.consumers()) <= attention.query.at(0));
        assert_eq!(profile.value.at(0), profile.key.at(0) + 64 * rows);
        assert_eq!(profile.key.at(1), profile.value.at(0) + 64 * rows);
        assert!(profile.judged.at(1) <= profile.verdict.at(0) && profile.verdict.at(4) <= profile.masked_sum.at(0));
        assert!(profile.masked_sum.at(2 * 64) <= profile.query.at(0));
    }
}

/// A block fits every GPU since Ampere. So do two, with head dim 64; with 128 they fit the GPUs
/// whose multiprocessors have 164 KiB.
#[test]
fn shared_memory_of_warps() {
    let arch = Arch::SM_80;
    for (head_dim, two_fit) in [(64, arch.shared_bytes), (128, 164 * 1024)] {
        let image = Image { head_dim, dtype: Dtype::Bf16 };
        let tiles = Tiles::new(arch, head_dim, Compute::Dtype);
        let (attention, profile) = (WarpAttentionShared::new(tiles, image), WarpProfileShared::new(image));
        assert!(attention.bytes.max(profile.bytes) <= arch.block_shared_bytes);
        assert!(2 * (attention.bytes + arch.reserved_shared_bytes) <= two_fit, "{} bytes", attention.bytes);
        if profile_min_blocks(arch, head_dim) == 2 {
            assert!(2 * (profile.bytes + arch.reserved_shared_bytes) <= two_fit, "{} bytes", profile.bytes);
        }
        if holds_queries(head_dim) {
            assert_eq!(attention.query.at(0), attention.ring.at(tiles.stages - 1));
            assert_eq!(attention.query.at(1).max(attention.ring.at(tiles.stages)), attention.seen.at(0));
        } else {
            assert_eq!(attention.query.at(1), attention.ring.at(0));
            assert_eq!(attention.ring.at(tiles.stages), attention.seen.at(0));
        }
        assert_eq!(attention.seen.at(tiles.query_rows), attention.warp_seen.at(0));
        assert_eq!(attention.warp_seen.at(tiles.query_rows / WARP_ROWS), attention.work.at(0));
        assert_eq!(attention.work.at(2), attention.bytes);
        assert_eq!(profile.query.at(1), profile.ring.at(0));
        // Warps have twins with head dim 128 alone.
        assert!(head_dim == 64 || profile.weights.at(2 * 8) <= profile.ring.at(0));
        assert_eq!(profile.ring.at(WarpProfileShared::STAGES), profile.seen.at(0));
        assert_eq!(profile.seen.at(4 * 2 * 64), profile.halves.at(0));
        assert_eq!(profile.halves.at(3 * 2 * 64), profile.sees_any.at(0));
        assert_eq!(profile.sees_any.at(2 * 64), profile.bytes);
    }
}
