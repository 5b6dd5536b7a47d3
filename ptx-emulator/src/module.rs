//! A module: how it is loaded, what is checked before a launch, and what a launch returns.

use crate::banks::SharedAccesses;
use crate::decode::{self, Target};
use crate::fault::{Error, Fault, FaultKind, shorten};
use crate::global::{Global, Memory, ModuleData};
use crate::isa::{Kernel, MAX_SHARED, SHARED_BASE};
use crate::parse::{self, Init, Variable, VariableSpace};
use crate::schedule::{Job, LaunchConfig, Options};
use std::collections::{BTreeMap, HashMap};

/// A PTX module, parsed and decoded, with the values of its global variables.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Kernel>,
    data: ModuleData,
}

/// What a launch executed and moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// How many warp instructions were executed, by opcode with all modifiers, such as
    /// `fma.rn.f32`.
    pub instructions: BTreeMap<String, u64>,
    /// Bytes that bulk copies brought to shared memory.
    pub bulk_bytes_to_shared: u64,
    /// Bytes that bulk copies brought to global memory.
    pub bulk_bytes_to_global: u64,
    /// Bytes that ordinary loads of the lanes read, from any space. What `cp.async` copies is not
    /// counted.
    pub loaded_bytes: u64,
    /// Bytes that ordinary stores of the lanes wrote, to any space.
    pub stored_bytes: u64,
    /// How the banks of shared memory served loads, stores, `ldmatrix`, `stmatrix` and the writes
    /// of `cp.async`: by the line of the PTX text, and the instruction there. Atomics, `wgmma` and
    /// bulk copies are not counted.
    pub shared_accesses: BTreeMap<(u32, String), SharedAccesses>,
    /// How many multiply-adds `wgmma` and `mma.sync` did.
    pub multiply_adds: u64,
}

impl Stats {
    /// How many warp instructions were executed.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.instructions.values().sum()
    }

    /// How many warp instructions were executed whose opcode is `prefix`, or starts with it and a
    /// dot: `count("wgmma.mma_async")`.
    #[must_use]
    pub fn count(&self, prefix: &str) -> u64 {
        let matches =
            |opcode: &str| opcode.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        self.instructions.iter().filter(|(opcode, _)| matches(opcode)).map(|(_, count)| count).sum()
    }

    /// How many wavefronts there were because of bank conflicts, and a line for each instruction
    /// that had some.
    #[must_use]
    pub fn bank_conflicts(&self) -> (u64, String) {
        let (mut total, mut text) = (0, String::new());
        for ((line, instruction), found) in self.shared_accesses.iter().filter(|(_, found)| found.conflicts > 0) {
            total += found.conflicts;
            text += &format!(
                "line {line}: `{}`: {} conflicts in {} accesses\n",
                shorten(instruction),
                found.conflicts,
                found.accesses
            );
        }
        (total, text)
    }

    /// Adds the numbers of another launch.
    pub fn add(&mut self, other: &Stats) {
        for (opcode, count) in &other.instructions {
            *self.instructions.entry(opcode.clone()).or_default() += count;
        }
        self.bulk_bytes_to_shared += other.bulk_bytes_to_shared;
        self.bulk_bytes_to_global += other.bulk_bytes_to_global;
        self.loaded_bytes += other.loaded_bytes;
        self.stored_bytes += other.stored_bytes;
        self.multiply_adds += other.multiply_adds;
        for (place, accesses) in &other.shared_accesses {
            self.shared_accesses.entry(place.clone()).or_default().add(accesses);
        }
    }
}

impl Module {
    /// Parses and decodes a module. Its errors say `name`.
    ///
    /// # Errors
    /// The text is malformed, or has a directive, instruction, modifier or operand that the
    /// emulator does not know. The error tells the line.
    pub fn parse(name: &str, ptx: &str) -> Result<Module, Error> {
        let unit = parse::parse(name, ptx)?;
        let (target, line) = &unit.target;
        let target = Target::new(target, unit.version).map_err(|what| Error::at(name, *line, what))?;
        let Variables { symbols, data, shared, dynamic } = place_variables(name, &unit.variables)?;
        let kernels = unit
            .entries
            .into_iter()
            .map(|mut entry| {
                entry.variables.extend(dynamic.iter().cloned());
                decode::decode(name, &target, &entry, &symbols, shared)
            })
            .collect::<Result<Vec<Kernel>, Error>>()?;
        Ok(Module { kernels, data })
    }

    /// The names of the entries.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.kernels.iter().map(|kernel| kernel.name.as_str())
    }

    /// Runs an entry to its end. Its blocks run in parallel.
    ///
    /// `params` is the parameter block: each parameter in order, at a multiple of its alignment, in
    /// little-endian bytes. `cuLaunchKernel` takes the same with `CU_LAUNCH_PARAM_BUFFER_POINTER`.
    ///
    /// # Errors
    /// The first fault of the lowest block that has one, or what is wrong with the launch itself
    /// ([`FaultKind::Launch`]).
    pub fn launch(&self, memory: &Memory, entry: &str, config: LaunchConfig, params: &[u8]) -> Result<Stats, Fault> {
        self.launch_with(memory, entry, config, params, Options::default())
    }

    /// Does what [`Module::launch`] does, in another order or with other limits.
    ///
    /// # Errors
    /// Those of [`Module::launch`].
    pub fn launch_with(
        &self,
        memory: &Memory,
        entry: &str,
        config: LaunchConfig,
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
        check(kernel, config, params).map_err(refuse)?;
        let job = Job { kernel, global: Global::new(memory, &self.data), params, config, options };
        let counters = job.run()?;
        let mut stats = Stats {
            bulk_bytes_to_shared: counters.bulk_in,
            bulk_bytes_to_global: counters.bulk_out,
            loaded_bytes: counters.loaded,
            stored_bytes: counters.stored,
            multiply_adds: counters.products,
            ..Stats::default()
        };
        for (line, accesses) in kernel.lines.iter().zip(counters.shared) {
            if accesses.accesses > 0 {
                stats.shared_accesses.entry((line.line, line.text.clone())).or_default().add(&accesses);
            }
        }
        for (inst, count) in kernel.code.iter().zip(counters.operations) {
            if inst.first && count > 0 {
                *stats.instructions.entry(kernel.lines[inst.statement as usize].opcode.clone()).or_default() += count;
            }
        }
        Ok(stats)
    }
}

/// Where the variables of a module lie.
struct Variables {
    /// The address of each, in the space of its kind.
    symbols: HashMap<String, u64>,
    /// Those in global memory.
    data: ModuleData,
    /// Where the static shared memory of the module ends.
    shared: u32,
    /// Those of dynamic shared memory, which each entry places behind its own static shared memory.
    dynamic: Vec<Variable>,
}

/// Gives each variable an address, and writes initial values.
fn place_variables(name: &str, variables: &[Variable]) -> Result<Variables, Error> {
    let mut data = ModuleData::default();
    let mut symbols: HashMap<String, u64> = HashMap::new();
    let mut shared = SHARED_BASE;
    let mut dynamic = Vec::new();
    for variable in variables {
        let align = variable.align.max(1);
        let address = match (variable.space, variable.bytes) {
            (VariableSpace::Shared, Some(_)) => decode::place_shared(name, variable, &mut shared)?,
            (VariableSpace::Shared, None) => {
                dynamic.push(variable.clone());
                continue;
            }
            (_, Some(bytes)) => data.alloc(bytes, align),
            (_, None) => {
                let what = format!("`{}` has no size: only dynamic shared memory may have none", variable.name);
                return Err(Error::at(name, variable.line, what));
            }
        };
        symbols.insert(variable.name.clone(), address);
    }
    for variable in variables {
        if variable.init.is_empty() {
            continue;
        }
        let mut bytes = Vec::new();
        for init in &variable.init {
            match init {
                Init::Bytes(value) => bytes.extend_from_slice(value),
                Init::Address(symbol, offset, size) => {
                    let Some(found) = symbols.get(symbol) else {
                        let what = format!("`{symbol}`, in the initial value of `{}`, is not declared", variable.name);
                        return Err(Error::at(name, variable.line, what));
                    };
                    let address = found.wrapping_add(*offset as u64).to_le_bytes();
                    bytes.extend_from_slice(&address[..*size]);
                }
            }
        }
        if bytes.len() as u64 > variable.bytes.unwrap_or(0) {
            let what = format!("the initial value of `{}` is longer than the variable", variable.name);
            return Err(Error::at(name, variable.line, what));
        }
        data.write(symbols[&variable.name], &bytes);
    }
    Ok(Variables { symbols, data, shared, dynamic })
}

/// Tells what is wrong with the sizes of a launch.
fn check(kernel: &Kernel, config: LaunchConfig, params: &[u8]) -> Result<(), String> {
    if params.len() as u64 != kernel.param_bytes {
        return Err(format!("{} bytes of parameters; the entry takes {}", params.len(), kernel.param_bytes));
    }
    let [x, y, z] = config.grid;
    if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 {
        return Err(format!("grid {x} x {y} x {z}: 1 to 2147483647 x 65535 x 65535 is allowed"));
    }
    let [x, y, z] = config.block;
    let threads = x as u64 * y as u64 * z as u64;
    if threads == 0 || threads > 1024 || z > 64 {
        return Err(format!("block {x} x {y} x {z}: 1 to 1024 threads, at most 64 in z, are allowed"));
    }
    if kernel.max_threads.is_some_and(|most| threads > most as u64) {
        return Err(format!("{threads} threads a block; the entry allows {}", kernel.max_threads.unwrap_or(0)));
    }
    if kernel.required_block.is_some_and(|required| required != config.block) {
        return Err(format!(
            "block {x} x {y} x {z}; the entry requires {:?}",
            kernel.required_block.unwrap_or_default()
        ));
    }
    if config.shared_bytes > MAX_SHARED || Job::shared_bytes(kernel, config.shared_bytes) > MAX_SHARED {
        return Err(format!(
            "{} bytes of dynamic and {} of static shared memory; a block has {MAX_SHARED}",
            config.shared_bytes, kernel.static_shared
        ));
    }
    Ok(())
}
