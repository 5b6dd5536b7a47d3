//! A user's own kernels: attention of a spelled-out shape, and beside it a kernel that is written
//! by hand on the same layer.
#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]

use framestride_kernels::cuda::{global, shared, thread, warp};
use framestride_kernels::{attention_kernels, kernel};

// The shape is that of shapes/models/tiny_text_rope.toml, key for key.
attention_kernels!(
    name = "tiny_text_rope", frames = 13, tokens_per_frame = 41, before = { tokens = 23 }, after = { tokens = 17 },
    heads = 2, head_dim = 128, dtype = bf16, batch = 1,
    qk_norm = layer { over = heads, eps = 1e-3 }, rope = half { channels = 96, after = true },
    mask = spatial { half_width_frames = 2 }, mask = temporal { half_width = 60 }, sink_frames = 1,
    profile = { rows = 100, seed = 7 },
    schedule = { steps = 4, layers = 6, dense_steps = 1, dense_layers = 2 },
);

const THREADS: u32 = 256;

/// How much a tensor changed from one denoising step to the next. Engines that skip steps ask this.
/// Each block writes its part of the sums of |after - before| and |before|.
///
/// `before` and `after` are f32 \[count\], aligned to 16 bytes, and `count` is a multiple of 4.
/// `sums` is f32 \[blocks, 2\], aligned to 8 bytes.
///
/// # Safety
/// The addresses are as the names say, and no other kernel writes the inputs meanwhile.
#[kernel(threads = 256, min_blocks = 4, shared_bytes = 64)]
pub unsafe fn change(before: u64, after: u64, sums: u64, count: u32) {
    let (mut difference, mut size) = (0.0, 0.0);
    let mut index = (thread::block_x() * THREADS + thread::index()) * 4;
    while index < count {
        let offset = u64::from(index) * 4;
        // SAFETY: the caller vouches for the addresses, and the index lies inside the tensors.
        let (old, new) = unsafe { (global::load_f32x4(before + offset), global::load_f32x4(after + offset)) };
        for (old, new) in old.into_iter().zip(new) {
            difference += (new - old).abs();
            size += old.abs();
        }
        index += thread::blocks_x() * THREADS * 4;
    }
    let (warp_index, lane) = (thread::warp(), thread::lane());
    let part = |warp_index: u32| shared::base() + warp_index * 8;
    // SAFETY: every thread of the block comes here and through the barrier. 8 warps have 8 bytes
    // each.
    unsafe {
        (difference, size) = (warp::sum::<32>(difference), warp::sum::<32>(size));
        if lane == 0 {
            shared::store_f32(part(warp_index), difference);
            shared::store_f32(part(warp_index) + 4, size);
        }
        thread::sync_block();
        if warp_index == 0 {
            // Each group of 8 lanes adds the 8 parts.
            let part = part(lane % 8);
            (difference, size) = (warp::sum::<8>(shared::load_f32(part)), warp::sum::<8>(shared::load_f32(part + 4)));
            if lane == 0 {
                global::store_f32x2(sums + u64::from(thread::block_x()) * 8, [difference, size]);
            }
        }
    }
}
