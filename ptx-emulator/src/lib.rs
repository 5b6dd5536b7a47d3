//! Runs PTX for NVIDIA Hopper (sm_90a) on the CPU, as it ships: the text that LLVM's backend or a person wrote, with warps,
//! shared memory, mbarriers, asynchronous copies and `wgmma`; and reports what a GPU forgives silently.
//!
//! ```
//! let ptx = "
//! .version 8.3
//! .target sm_90a
//! .address_size 64
//! .visible .entry twice(.param .u64 data) {
//!     .reg .b32 %r<3>;
//!     .reg .b64 %rd<4>;
//!     ld.param.u64 %rd1, [data];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     shl.b32 %r2, %r2, 1;
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }";
//! let module = ptx_emulator::Module::parse("twice.ptx", ptx)?;
//! let mut memory = ptx_emulator::Memory::new();
//! let data = memory.alloc(8, 4)?;
//! memory.write(data, &[21, 0, 0, 0, 4, 0, 0, 0])?;
//! let launch = ptx_emulator::Launch { grid: [1, 1, 1], block: [2, 1, 1], shared_bytes: 0 };
//! let stats = module.launch(&memory, "twice", launch, &data.to_le_bytes())?;
//! assert_eq!(memory.read(data, 8)?, [42, 0, 0, 0, 8, 0, 0, 0]);
//! assert_eq!(stats.count("ld.global"), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it promises
//!
//! Results are those of the PTX ISA for programs without data races; where the ISA leaves a result to the hardware, approximate
//! functions are at least as exact as the ISA asks, and sums inside `wgmma` are cut as Hopper's tensor cores cut them. Runs are
//! deterministic, except for the order of atomics of different blocks. Every breach of a rule that can be seen is a [`Fault`].
//!
//! **Orders.** Each block runs its warps in an order that follows from the launch's seed ([`Options::seed`]) and the block's number:
//! whose turn it is, how many instructions a turn has (from one to thousands), whether a completed barrier hands over at once, when
//! and in which order bulk copies land. Seed 0 is one unkind order for all blocks. A fault tells its seed, and is seen again with it,
//! unless atomics of other blocks decide what the block does.
//!
//! **Races in shared memory.** Whatever the order of a run, two accesses to a byte by different warps, one of them a write, must be
//! ordered by barriers, else the later one is a fault that names both. For each byte the last write and the last reads are known.
//! - What orders: `bar` and `barrier` (arrivals before those who wait), mbarriers (arrivals before waits and tests that see the phase
//!   over), and strong accesses to the same word (volatile, relaxed, acquire, release, atomic), with fences or without.
//! - A bulk copy writes for those who know its mbarrier's phase to be over, and counts as begun by the thread that issued it. A copy
//!   from shared memory and a `cp.async` are over for their thread when it has waited.
//! - A `wgmma` reads its operands until all four warps have waited for it (`wgmma.wait_group`). Until then a write or copy to them is
//!   a fault; from then on the writer must be ordered after all four waits. Each warp must know the writes that it reads. Its own
//!   registers are a warp's own once it has waited.
//! - Ordinary stores that `wgmma` or a bulk copy reads need a `fence.proxy.async` that is ordered between the two.
//! - An mbarrier is used by those who are ordered after its initialisation, and invalidated after all uses. An arrival, at an mbarrier or
//!   a named barrier, must be ordered after all arrivals of the phase before: else it might as well have counted there.
//!
//! **Lanes** of a warp meet at `bar.warp.sync`, a shuffle, vote, match or reduction, a barrier or another aligned instruction; that
//! some do not come is allowed. Until they meet, what one stores is not ordered before what another reads or writes, nor before an
//! arrival of another; and what one has waited for the others do not know. Stores of several lanes by one instruction to the same
//! bytes are no race. Of reads by several lanes to the same 16 bytes it is only known that they were.
//!
//! # How it is built
//!
//! `parse` makes statements of text, `decode` makes operations (`isa`) of statements, `warp` executes them on 32 lanes at a time
//! with the arithmetic of `alu` and `float`, `block` holds barriers and copies, `shared` and `memory` the memories, `wgmma` the
//! matrix products and `tensor_core` their arithmetic, `race` what is ordered, `schedule` the order of a run.
//!
//! # What it does not know
//!
//! Clusters of more than one block, tensor maps, textures, calls, device-side launches, `wgmma` other than f32 += bf16 or f16.
//! Weak memory orders are not explored: each access takes effect when it is executed. Races are not looked for in global memory, and
//! no proxy fence is asked for between a store and a later copy to the same place. Orders change between instructions, not within;
//! groups of lanes that went different ways take turns by their place in the text.

#![warn(missing_docs)]

mod alu;
mod block;
mod decode;
mod fault;
mod float;
mod isa;
mod memory;
mod parse;
mod race;
mod schedule;
mod shared;
mod tensor_core;
mod warp;
mod wgmma;

pub use fault::{Error, Fault, FaultKind};
pub use memory::{Memory, MemoryError};
pub use schedule::{Launch, Options};
pub use tensor_core::LARGEST_CUT;

use decode::Symbol;
use isa::{Kernel, SHARED_BASE};
use memory::{Global, ModuleData};
use parse::{Init, VariableSpace};
use schedule::Job;
use std::collections::{BTreeMap, HashMap};

/// Most shared memory of a block on Hopper: 227 KiB.
const MAX_SHARED: u32 = 227 * 1024;

/// A parsed and decoded PTX module, with its own global data.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Kernel>,
    data: ModuleData,
}

/// What a launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Executed warp instructions by opcode with all its modifiers, such as `fma.rn.f32`.
    pub instructions: BTreeMap<String, u64>,
    /// Bytes that bulk copies brought to shared memory.
    pub bulk_bytes_to_shared: u64,
    /// Bytes that bulk copies brought to global memory.
    pub bulk_bytes_to_global: u64,
    /// Bytes that the lanes' ordinary loads read, of any space; not what `cp.async` copies.
    pub loaded_bytes: u64,
    /// Bytes that the lanes' ordinary stores wrote, to any space.
    pub stored_bytes: u64,
    /// Multiply-adds of `wgmma`.
    pub wgmma_multiply_adds: u64,
}

impl Stats {
    /// All executed warp instructions.
    pub fn total(&self) -> u64 {
        self.instructions.values().sum()
    }

    /// Executed warp instructions whose opcode is `prefix` or starts with it and a dot: `count("wgmma.mma_async")`.
    pub fn count(&self, prefix: &str) -> u64 {
        let matches =
            |opcode: &str| opcode.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        self.instructions.iter().filter(|(opcode, _)| matches(opcode)).map(|(_, count)| count).sum()
    }

    /// Adds another launch's numbers.
    pub fn add(&mut self, other: &Stats) {
        for (opcode, count) in &other.instructions {
            *self.instructions.entry(opcode.clone()).or_default() += count;
        }
        self.bulk_bytes_to_shared += other.bulk_bytes_to_shared;
        self.bulk_bytes_to_global += other.bulk_bytes_to_global;
        self.loaded_bytes += other.loaded_bytes;
        self.stored_bytes += other.stored_bytes;
        self.wgmma_multiply_adds += other.wgmma_multiply_adds;
    }
}

impl Module {
    /// Parses and decodes a module; `name` stands in its errors.
    ///
    /// # Errors
    /// Malformed text, and every directive, instruction, modifier or operand that the emulator does not know, with its line.
    pub fn parse(name: &str, ptx: &str) -> Result<Module, Error> {
        let unit = parse::parse(name, ptx)?;
        let mut data = ModuleData::default();
        let mut symbols: HashMap<String, Symbol> = HashMap::new();
        let mut shared = SHARED_BASE;
        let mut dynamic = Vec::new();
        for variable in &unit.variables {
            let align = variable.align.max(1);
            let address = match (variable.space, variable.bytes) {
                (VariableSpace::Shared, Some(bytes)) => {
                    let address = shared.next_multiple_of(align as u32);
                    shared = address + bytes as u32;
                    address as u64
                }
                (VariableSpace::Shared, None) => {
                    dynamic.push(variable.clone());
                    continue;
                }
                (_, Some(bytes)) => data.alloc(bytes, align),
                (_, None) => {
                    return Err(Error::at(name, 0, format!("`{}` has no size and is not shared", variable.name)));
                }
            };
            symbols.insert(variable.name.clone(), Symbol { address });
        }
        for variable in &unit.variables {
            if variable.init.is_empty() {
                continue;
            }
            let mut bytes = Vec::new();
            for init in &variable.init {
                match init {
                    Init::Bytes(value) => bytes.extend_from_slice(value),
                    Init::Address(symbol, offset, size) => {
                        let Some(found) = symbols.get(symbol) else {
                            let what =
                                format!("`{symbol}`, in the initial value of `{}`, is not declared", variable.name);
                            return Err(Error::at(name, 0, what));
                        };
                        let address = found.address.wrapping_add(*offset as u64).to_le_bytes();
                        bytes.extend_from_slice(&address[..*size]);
                    }
                }
            }
            if bytes.len() as u64 > variable.bytes.unwrap_or(0) {
                return Err(Error::at(name, 0, format!("the initial value of `{}` is longer than it", variable.name)));
            }
            data.write(symbols[&variable.name].address, &bytes);
        }
        let kernels = unit
            .entries
            .into_iter()
            .map(|mut entry| {
                entry.variables.extend(dynamic.iter().cloned());
                decode::decode(name, &entry, &symbols, shared)
            })
            .collect::<Result<Vec<Kernel>, Error>>()?;
        Ok(Module { kernels, data })
    }

    /// Names of the entries.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.kernels.iter().map(|kernel| kernel.name.as_str())
    }

    /// Runs an entry to its end, blocks in parallel. `params` is the parameter block: each parameter at its offset and alignment,
    /// in order, as `cuLaunchKernel` takes with `CU_LAUNCH_PARAM_BUFFER_POINTER`.
    ///
    /// # Errors
    /// The first fault of the lowest faulty block, or what is wrong with the launch itself ([`FaultKind::Launch`]).
    pub fn launch(&self, memory: &Memory, entry: &str, launch: Launch, params: &[u8]) -> Result<Stats, Fault> {
        self.launch_with(memory, entry, launch, params, Options::default())
    }

    /// [`Module::launch`] in another order, or with other limits.
    ///
    /// # Errors
    /// As [`Module::launch`].
    pub fn launch_with(
        &self,
        memory: &Memory,
        entry: &str,
        launch: Launch,
        params: &[u8],
        options: Options,
    ) -> Result<Stats, Fault> {
        let refuse = |what: String| Fault {
            kind: FaultKind::Launch,
            kernel: entry.to_string(),
            block: [0; 3],
            seed: 0,
            warp: None,
            lane: None,
            line: 0,
            instruction: String::new(),
            what,
        };
        let Some(kernel) = self.kernels.iter().find(|kernel| kernel.name == entry) else {
            let known: Vec<&str> = self.entries().collect();
            return Err(refuse(format!("the module has no entry of this name; it has {}", known.join(", "))));
        };
        check(kernel, launch, params).map_err(refuse)?;
        let job = Job { kernel, global: Global::new(memory, &self.data), params, launch, options };
        let counters = job.run()?;
        let mut stats = Stats {
            bulk_bytes_to_shared: counters.bulk_in,
            bulk_bytes_to_global: counters.bulk_out,
            loaded_bytes: counters.loaded,
            stored_bytes: counters.stored,
            wgmma_multiply_adds: counters.products,
            ..Stats::default()
        };
        for (inst, count) in kernel.code.iter().zip(counters.operations) {
            if inst.first && count > 0 {
                *stats.instructions.entry(kernel.lines[inst.statement as usize].opcode.clone()).or_default() += count;
            }
        }
        Ok(stats)
    }
}

/// What is wrong with a launch's sizes.
fn check(kernel: &Kernel, launch: Launch, params: &[u8]) -> Result<(), String> {
    if params.len() as u64 != kernel.param_bytes {
        return Err(format!("{} bytes of parameters; the entry takes {}", params.len(), kernel.param_bytes));
    }
    let [x, y, z] = launch.grid;
    if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 {
        return Err(format!("grid {x} x {y} x {z}: 1 to 2147483647 x 65535 x 65535 is allowed"));
    }
    let [x, y, z] = launch.block;
    let threads = x as u64 * y as u64 * z as u64;
    if threads == 0 || threads > 1024 || z > 64 {
        return Err(format!("block {x} x {y} x {z}: 1 to 1024 threads, at most 64 in z, are allowed"));
    }
    if kernel.max_threads.is_some_and(|most| threads > most as u64) {
        return Err(format!("{threads} threads a block; the entry allows {}", kernel.max_threads.unwrap_or(0)));
    }
    if kernel.required_block.is_some_and(|required| required != launch.block) {
        return Err(format!(
            "block {x} x {y} x {z}; the entry requires {:?}",
            kernel.required_block.unwrap_or_default()
        ));
    }
    if launch.shared_bytes > MAX_SHARED || Job::shared_bytes(kernel, launch.shared_bytes) > MAX_SHARED {
        return Err(format!(
            "{} bytes of dynamic and {} of static shared memory; a block has {MAX_SHARED}",
            launch.shared_bytes, kernel.static_shared
        ));
    }
    Ok(())
}
