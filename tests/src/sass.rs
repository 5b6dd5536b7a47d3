//! Reads the machine code that ptxas makes: instructions, loops, and whether attention's softmax
//! runs under the matrix products.
//!
//! ptxas may move code across the waits of asynchronous products. Then the kernel is right but
//! slow. In the main loop, two groups of products are issued. The first wait is for the scores
//! (`WARPGROUP.DEPBAR.LE gsb0, 0x1`). Every `MUFU.EX2` of the softmax should stand before the
//! second wait (`gsb0, 0x0`), so that it runs while the second group is in flight.
//! [`Function::overlaps`] tells whether it does.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::process::Command;

use framestride_builder::ptxas;
use framestride_builder::toolchain::CudaTools;
use framestride_shapes::manifest::Ptxas;

/// The machine code of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Its kernels, in the order of the disassembly.
    pub functions: Vec<Function>,
}

/// The machine code of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Name of the entry.
    pub name: String,
    /// Its instructions.
    pub instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Opcode with modifiers: `WARPGROUP.DEPBAR.LE`.
    pub opcode: String,
    /// Operands as they are printed.
    pub operands: String,
    /// Index of the instruction that it may jump to.
    pub target: Option<usize>,
}

/// How much of the softmax runs under the matrix products, in a loop that waits for one group of
/// two and then for the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The loop, as indices into the instructions.
    pub main_loop: Range<usize>,
    /// Products in the loop: `HGMMA` of 16 bits, or `QGMMA` of 8.
    pub products: usize,
    /// `MUFU.EX2` in the loop.
    pub exponentials: usize,
    /// Those between the wait for the first group and the wait for the second.
    pub between_waits: usize,
}

impl Listing {
    /// Assembles PTX for a GPU such as `sm_89`, and disassembles the result. Gives ptxas's report
    /// of each kernel too. Fails if a tool is missing, or with what the tool says.
    pub fn from_ptx(
        name: &str,
        ptx: &str,
        target: &str,
        tools: &CudaTools,
    ) -> Result<(Listing, BTreeMap<String, Ptxas>), String> {
        let (Some(assembler), Some(disassembler)) = (&tools.ptxas, &tools.nvdisasm) else {
            return Err("these tests need ptxas and nvdisasm: `cargo xtask test` installs them, `cargo xtask doctor` \
                        shows where they are looked for"
                .into());
        };
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let (source, cubin) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
        fs::write(&source, ptx).map_err(|error| format!("cannot write {}: {error}", source.display()))?;
        let report = ptxas::assemble(name, assembler, target, &source, &cubin).map_err(|error| error.to_string())?;
        // Labels of branches need no analysis of data flow.
        let answer = Command::new(disassembler).args(["-c", "-ndf"]).arg(&cubin).output();
        let answer = answer.map_err(|error| format!("{} does not start: {error}", disassembler.display()))?;
        if !answer.status.success() {
            return Err(format!("{name}: nvdisasm says: {}", String::from_utf8_lossy(&answer.stderr)));
        }
        Ok((Listing::parse(&String::from_utf8_lossy(&answer.stdout)), report))
    }

    /// Reads what `nvdisasm -c` prints.
    pub fn parse(text: &str) -> Listing {
        let mut functions = Vec::new();
        let mut open: Option<(Function, HashMap<&str, usize>)> = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
                functions.extend(open.take().map(resolve));
                open = Some((Function { name: name.into(), instructions: Vec::new() }, HashMap::new()));
            } else if let Some((function, labels)) = &mut open {
                if let Some(label) = line.strip_prefix(".L_").and_then(|_| line.strip_suffix(':')) {
                    labels.insert(label, function.instructions.len());
                } else {
                    function.instructions.extend(instruction(line));
                }
            }
        }
        functions.extend(open.take().map(resolve));
        Listing { functions }
    }

    /// The kernel of this name.
    pub fn function(&self, name: &str) -> Option<&Function> {
        self.functions.iter().find(|function| function.name == name)
    }
}

/// Reads a line such as `/*0340*/  @!P1 BRA `(.L_x_209) ;`.
fn instruction(line: &str) -> Option<Instruction> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    u64::from_str_radix(address, 16).ok()?;
    let rest = rest.trim().trim_end_matches(';').trim_end();
    let (_, rest) = rest.strip_prefix('@').map_or(Some(("", rest)), |guarded| guarded.split_once(' '))?;
    let (opcode, operands) = rest.trim_start().split_once(' ').unwrap_or((rest, ""));
    Some(Instruction { opcode: opcode.into(), operands: operands.trim().into(), target: None })
}

/// Turns the labels that instructions name into indices.
fn resolve((mut function, labels): (Function, HashMap<&str, usize>)) -> Function {
    for instruction in &mut function.instructions {
        let label = instruction.operands.split_once("`(").and_then(|(_, rest)| rest.split_once(')'));
        instruction.target = label.and_then(|(label, _)| labels.get(label).copied());
    }
    function
}

impl Function {
    /// Instructions whose opcode is `name` or begins with it and a dot.
    pub fn count(&self, name: &str) -> usize {
        self.instructions.iter().filter(|instruction| instruction.is(name)).count()
    }

    /// Every loop, as the range from the target of a backward branch to that branch. The branch to
    /// itself that pads the end of a kernel is none.
    pub fn loops(&self) -> Vec<Range<usize>> {
        let branches = self.instructions.iter().enumerate().filter(|(_, instruction)| instruction.is("BRA"));
        branches
            .filter_map(|(at, branch)| branch.target.filter(|target| *target < at).map(|target| target..at + 1))
            .collect()
    }

    /// The overlap in every innermost loop with both waits.
    pub fn overlaps(&self) -> Vec<Overlap> {
        let waits = |range: &Range<usize>| {
            let wait = |groups: &str| {
                let found = |i: &Instruction| i.is("WARPGROUP.DEPBAR") && i.operands.ends_with(groups);
                range.clone().find(|&at| found(&self.instructions[at]))
            };
            let (first, second) = (wait(", 0x1")?, wait(", 0x0")?);
            (first < second).then_some(first..second)
        };
        let count = |range: &Range<usize>, name| self.instructions[range.clone()].iter().filter(|i| i.is(name)).count();
        let mut loops = self.loops();
        loops.sort_by_key(Range::len);
        let mut overlaps: Vec<Overlap> = Vec::new();
        for range in loops {
            // Loops around one that is known, and ways back into it from code that stands
            // elsewhere, do not count.
            let meets = |inner: &Overlap| range.start < inner.main_loop.end && inner.main_loop.start < range.end;
            if let Some(between) = waits(&range).filter(|_| !overlaps.iter().any(meets)) {
                overlaps.push(Overlap {
                    products: count(&range, "HGMMA") + count(&range, "QGMMA"),
                    exponentials: count(&range, "MUFU.EX2"),
                    between_waits: count(&between, "MUFU.EX2"),
                    main_loop: range,
                });
            }
        }
        overlaps.sort_by_key(|overlap| overlap.main_loop.start);
        overlaps
    }
}

impl Instruction {
    /// Whether the opcode is `name`, or `name` with more modifiers.
    pub fn is(&self, name: &str) -> bool {
        self.opcode.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "
//--------------------- .text.attention --------------------------
attention:
.text.attention:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_9:
        /*0010*/                   MUFU.EX2 R0, R0 ;
.L_x_1:
        /*0020*/                   HGMMA.64x176x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
.L_x_5:
        /*0040*/                   MUFU.EX2 R2, R2 ;
        /*0050*/                   MUFU.EX2.F16 R2, R2 ;
        /*0060*/              @!P3 BRA `(.L_x_6) ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   MUFU.EX2 R3, R3 ;
        /*0090*/               @P3 BRA P0, `(.L_x_1) ;
        /*00a0*/               @P0 BRA.U.ANY `(.L_x_9) ;
.L_x_6:
        /*00b0*/                   EXIT ;
.L_x_7:
        /*00c0*/                   BRA `(.L_x_7);
.L_x_8:
.text.other:
        /*0000*/                   EXIT ;
";

    #[test]
    fn instructions_loops_and_overlap_are_read() {
        let listing = Listing::parse(LISTING);
        assert_eq!(listing.functions.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["attention", "other"]);
        let attention = listing.function("attention").unwrap();
        assert_eq!(attention.instructions.len(), 13);
        let branch = &attention.instructions[6];
        assert_eq!((branch.opcode.as_str(), branch.target), ("BRA", Some(11)));
        assert_eq!(attention.loops(), [2..10, 1..11]);
        let expected = Overlap { main_loop: 2..10, products: 1, exponentials: 3, between_waits: 2 };
        assert_eq!(attention.overlaps(), [expected]);
        assert_eq!((attention.count("MUFU.EX2"), attention.count("MUFU")), (4, 4));
        assert_eq!(listing.function("other").unwrap().overlaps(), []);
    }
}
