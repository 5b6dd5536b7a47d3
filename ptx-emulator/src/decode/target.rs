//! The GPUs that a module is for: its `.target`, and which instructions that allows.
//!
//! A driver refuses a module whose instructions its target lacks, even on a GPU that has them. What
//! each needs is as the PTX ISA says, and as ptxas was found to check.

use super::Decode;
use crate::parse::{Operand, Statement};

/// The target of a module.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    name: String,
    /// The compute capability: 80 for `sm_80`.
    capability: u32,
    /// What follows the number: `a` allows what only this capability has, `f` what its family has.
    suffix: String,
}

/// Each capability with the first PTX version that has it.
const CAPABILITIES: [(u32, [u32; 2]); 11] = [
    (80, [7, 0]),
    (86, [7, 1]),
    (87, [7, 4]),
    (89, [7, 8]),
    (90, [7, 8]),
    (100, [8, 6]),
    (101, [8, 6]),
    (103, [8, 8]),
    (110, [9, 0]),
    (120, [8, 7]),
    (121, [8, 8]),
];

/// What an instruction asks of a target.
#[derive(Clone, Copy, PartialEq)]
enum Need {
    /// Its capability is at least this one.
    AtLeast(u32),
    /// It is `sm_90a` and no other.
    Hopper,
    /// It is `sm_90a` or a later one with a suffix.
    HopperOrLater,
}

impl Target {
    /// The target of a name such as `sm_90a`, in a module of a PTX version.
    pub fn new(name: &str, version: [u32; 2]) -> Decode<Target> {
        let number = name.strip_prefix("sm_").unwrap_or_default();
        let digits = number.trim_end_matches(['a', 'f']);
        let suffix = &number[digits.len()..];
        let found = CAPABILITIES.iter().find(|(capability, _)| *digits == capability.to_string());
        let suffixed = |capability: u32| match suffix {
            "" => true,
            "a" => capability >= 90,
            _ => suffix == "f" && capability >= 100,
        };
        let Some((capability, first)) = found.filter(|(capability, _)| suffixed(*capability)) else {
            return Err(format!("target `{name}` is unknown: sm_80 and later GPUs are known"));
        };
        let first = if (*capability, suffix) == (90, "a") { &[8, 0] } else { first };
        if version < *first {
            let ([major, minor], [least, after]) = (version, first);
            return Err(format!("PTX {major}.{minor} does not know target {name}: it needs .version {least}.{after}"));
        }
        Ok(Target { name: name.to_string(), capability: *capability, suffix: suffix.to_string() })
    }

    /// Checks that the target has an instruction, as far as the emulator knows it.
    pub fn check(&self, s: &Statement) -> Decode {
        let Some(need) = need(s) else { return Ok(()) };
        let (has, needed) = match need {
            Need::AtLeast(least) => (self.capability >= least, format!("sm_{least} or later")),
            Need::Hopper => (self.capability == 90 && self.suffix == "a", "sm_90a".into()),
            Need::HopperOrLater => (!self.suffix.is_empty(), "sm_90a or a later one with a suffix".into()),
        };
        if has {
            return Ok(());
        }
        Err(format!("the module's target {} does not have this instruction: it needs {needed}", self.name))
    }
}

/// What a statement needs beyond `sm_80`.
fn need(s: &Statement) -> Option<Need> {
    let mut parts = s.opcode.split('.');
    let root = parts.next().unwrap_or_default();
    let parts: Vec<&str> = parts.collect();
    let any = |names: &[&str]| parts.iter().any(|part| names.contains(part));
    let bf16 = any(&["bf16", "bf16x2"]);
    let cluster = |operand: &Operand| matches!(operand, Operand::Name(name, _) if name.starts_with("%cluster"));
    let hopper = match root {
        "wgmma" => return Some(Need::Hopper),
        "setmaxnreg" => return Some(Need::HopperOrLater),
        "elect" | "griddepcontrol" | "mapa" | "stmatrix" => true,
        // Before Hopper, an arrival that may complete its phase has no count.
        "mbarrier" => {
            any(&["try_wait", "expect_tx", "complete_tx"])
                || any(&["arrive", "arrive_drop"]) && !matches!(s.operands.last(), Some(Operand::Address(..)))
        }
        "cp" => any(&["bulk"]),
        "fence" => any(&["mbarrier_init"]) || parts.iter().any(|part| part.starts_with("async")),
        "atom" | "red" => bf16 || any(&["v2", "v4", "v8"]),
        "add" | "sub" | "mul" | "ex2" | "tanh" | "set" | "setp" => bf16,
        // Only conversions between bf16 and f32 are older.
        "cvt" => bf16 && !any(&["f32"]),
        "mov" => s.operands.iter().any(cluster),
        _ => false,
    };
    if hopper || any(&["cluster", "shared::cluster"]) {
        return Some(Need::AtLeast(90));
    }
    (root == "cvt" && any(&["e4m3x2", "e5m2x2"])).then_some(Need::AtLeast(89))
}
