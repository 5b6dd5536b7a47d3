//! Runs PTX for NVIDIA GPUs from Ampere (sm_80) to Hopper (sm_90a) on the CPU, and reports what a
//! GPU forgives silently.
//!
//! It runs the text that ships, whether LLVM's backend or a person wrote it: warps, shared memory,
//! mbarriers, asynchronous copies, `mma.sync` and `wgmma`. It needs no GPU.
//!
//! ```
//! use ptx_emulator::{FaultKind, LaunchConfig, Memory, Module};
//!
//! // Each of 32 threads doubles a number, and stores it in reverse order by way of shared memory.
//! let ptx = "
//! .version 8.3
//! .target sm_90a
//! .address_size 64
//! .visible .entry reverse(.param .u64 data) {
//!     .reg .b32 %r<6>;
//!     .reg .b64 %rd<4>;
//!     .shared .align 4 .b8 words[128];
//!     ld.param.u64 %rd1, [data];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     add.u32 %r2, %r2, %r2;
//!     mov.u32 %r3, words;
//!     mad.lo.u32 %r4, %r1, 4, %r3;
//!     st.shared.u32 [%r4], %r2;
//!     bar.sync 0;
//!     sub.u32 %r5, 31, %r1;
//!     mad.lo.u32 %r4, %r5, 4, %r3;
//!     ld.shared.u32 %r2, [%r4];
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }";
//! let numbers = |f: fn(u32) -> u32| (0..32).flat_map(|i| f(i).to_le_bytes()).collect::<Vec<u8>>();
//! let mut memory = Memory::new();
//! let data = memory.alloc(128, 4)?;
//! memory.write(data, &numbers(|i| i))?;
//! let config = LaunchConfig { grid: [1, 1, 1], block: [32, 1, 1], shared_bytes: 0 };
//! let module = Module::parse("reverse.ptx", ptx)?;
//! let stats = module.launch(&memory, "reverse", config, &data.to_le_bytes())?;
//! assert_eq!(memory.read(data, 128)?, numbers(|i| 2 * (31 - i)));
//! assert_eq!(stats.count("ld.shared"), 1);
//!
//! // Without the barrier a GPU may give the right numbers for years. The emulator says who races.
//! let module = Module::parse("reverse.ptx", &ptx.replace("bar.sync 0;", ""))?;
//! let fault = module.launch(&memory, "reverse", config, &data.to_le_bytes()).unwrap_err();
//! assert_eq!(fault.kind, FaultKind::Race);
//! let race = "no barrier orders it after some of them were written by warp 0";
//! assert!(fault.to_string().contains(race));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it promises
//!
//! * **Results** are those of the PTX ISA, for programs without data races. Where the ISA leaves a
//!   result to the hardware, approximate functions are at least as exact as it asks. Sums of
//!   `wgmma` are cut as Hopper's tensor cores cut them, and so are those of `mma.sync`.
//! * **Runs repeat**: a launch does the same each time, except for the order of atomics of
//!   different blocks.
//! * **Orders** differ with the seed of a launch ([`Options::seed`]) and the number of a block. An
//!   order decides which warp has a turn, and how long the turn is. It decides when bulk copies
//!   land, and whether a completed barrier hands over at once. Seed 0 is one unkind order.
//! * **Every breach of a rule** that can be seen is a [`Fault`]. It tells its seed, and is seen
//!   again with it, unless atomics of other blocks decide what the block does.
//!
//! # What it checks that a GPU forgives
//!
//! **Addresses** lie in an allocation and are aligned. Shared memory is written before it is read.
//!
//! **Races in shared memory.** Two accesses to a byte by different warps, one of them a write, must
//! be ordered by barriers. Else the later one is a fault that names both, in whatever order they
//! ran.
//!
//! * These order accesses: `bar` and `barrier`, mbarriers, and strong accesses to the same word
//!   (volatile, relaxed, acquire, release, atomic), with fences or without.
//! * A bulk copy writes for those who know that its phase of the mbarrier is complete. It starts
//!   when its thread issues it. A copy from shared memory, and a `cp.async`, end for their thread
//!   when it has waited.
//! * A `wgmma` reads its operands until all four warps have waited for it. Until then a write to
//!   them is a fault. After that the writer must be ordered after all four waits. Each of the four
//!   warps must be ordered after the writes that it reads.
//! * Stores that `wgmma` or a bulk copy reads need a `fence.proxy.async` in between.
//! * An mbarrier is used after its initialisation, and invalidated after its uses. An arrival at a
//!   barrier is ordered after all arrivals of the phase before, where it might else have counted.
//!
//! **Lanes** of a warp meet at `bar.warp.sync`, a shuffle, vote, match or reduction, a barrier, or
//! another aligned instruction but `mma.sync`, `ldmatrix` and `stmatrix`. Some may go another way,
//! where the instruction allows it. Until lanes meet, what one lane did is not ordered before what
//! another does, and what one lane waited for the others do not know. Stores of several lanes by
//! one instruction to the same bytes are no race.
//!
//! **Registers** of a `wgmma` are not touched between the last `wgmma.fence` and the `wgmma`, nor
//! from then on before its wait.
//!
//! **Ends.** No deadlock, no endless loop without progress, and nothing in flight when a block
//! ends.
//!
//! # What it does not model
//!
//! * Clusters of more than one block, tensor maps, textures, calls and launches from the device.
//!   Their text is an error.
//! * Tensor cores with other accumulators than f32. `wgmma` has factors of bf16, f16 and e4m3, and
//!   `mma.sync.m16n8k16` of bf16 and f16. The text of others is an error.
//! * Limits of other GPUs than Hopper: those of a launch are Hopper's, whatever `.target` a module
//!   has. Instructions that its target does not have are errors.
//! * Weak memory orders: each access takes effect when it is executed.
//! * Races in global memory, and a proxy fence between a store and a later copy to the same place.
//! * Orders within an instruction. Groups of lanes that went different ways take turns by their
//!   place in the text.
//! * Which lane read, where several lanes read the same 16 bytes: only that they did is remembered.
//!
//! # How it is built
//!
//! | module | what it does |
//! | --- | --- |
//! | `module` | loads a module, checks a launch, counts what it did |
//! | `parse` | makes statements of text |
//! | `decode` | makes operations of statements, by subject |
//! | `isa` | defines the operations |
//! | `schedule` | runs blocks in parallel, and the warps of a block in an order |
//! | `block` | holds what warps share: mbarriers, named barriers, copies in flight |
//! | `warp` | executes operations on 32 lanes: control flow, memory, barriers, copies |
//! | `tensor_core` | matrix products: one module for each family of instructions |
//! | `alu`, `float` | compute: a table of operations, and number formats |
//! | `global`, `shared` | hold memory |
//! | `banks` | counts conflicts of shared memory's banks |
//! | `race` | knows which accesses are ordered |
//! | `fault` | says what went wrong |

#![warn(missing_docs)]

mod alu;
mod banks;
mod block;
mod decode;
mod fault;
mod float;
mod global;
mod isa;
mod module;
mod parse;
mod race;
mod schedule;
mod shared;
mod tensor_core;
mod warp;

pub use banks::SharedAccesses;
pub use fault::{Error, Fault, FaultKind};
pub use global::{Memory, MemoryError};
pub use module::{Module, Stats};
pub use schedule::{LaunchConfig, Options};
pub use tensor_core::sums::Accumulation;
