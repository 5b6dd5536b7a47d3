//! Asks ptxas what machine code it makes of a PTX module: registers, stack, spills, and every
//! remark.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use framestride_shapes::manifest::Ptxas;

use crate::BuildError;
use crate::error::{at, said};

/// Assembles `ptx` to `cubin` for a GPU such as `sm_90a`, and reads what `ptxas -v` reports of each entry.
///
/// # Errors
/// [`BuildError::Tool`] with the message of ptxas if it refuses the PTX.
pub fn assemble(
    name: &str,
    ptxas: &Path,
    target: &str,
    ptx: &Path,
    cubin: &Path,
) -> Result<BTreeMap<String, Ptxas>, BuildError> {
    let answer = Command::new(ptxas)
        .arg(format!("-arch={target}"))
        // ptxas works on the entries of a module in parallel.
        .args(["-v", "--split-compile=0"])
        .arg(ptx)
        .arg("-o")
        .arg(cubin)
        .output()
        .map_err(at("start", ptxas))?;
    let text = String::from_utf8_lossy(&answer.stderr);
    if !answer.status.success() {
        return Err(BuildError::Tool {
            name: name.into(),
            tool: ptxas.into(),
            input: ptx.into(),
            message: said(&text),
        });
    }
    Ok(parse(&text))
}

/// Reads what `ptxas -v` prints. A remark that names an entry belongs to it, and any other remark
/// belongs to every entry.
pub fn parse(text: &str) -> BTreeMap<String, Ptxas> {
    let mut reports: BTreeMap<String, Ptxas> = BTreeMap::new();
    let mut current = None;
    let mut remarks = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let said = line.strip_prefix("ptxas").and_then(|rest| rest.split_once(':')).map(|(_, said)| said.trim());
        if let Some(entry) = said.and_then(|said| said.strip_prefix("Compiling entry function '")) {
            let entry = entry.split('\'').next().unwrap_or("").to_string();
            let empty = Ptxas { registers: 0, stack: 0, spill_stores: 0, spill_loads: 0, messages: Vec::new() };
            reports.insert(entry.clone(), empty);
            current = Some(entry);
        } else if let Some(entry) = said.and_then(|said| said.strip_prefix("Function properties for ")) {
            current = Some(entry.to_string());
        } else if let Some(report) = current.as_ref().and_then(|entry| reports.get_mut(entry))
            && line.contains(" bytes stack frame")
        {
            report.stack = number_before(line, " bytes stack frame");
            report.spill_stores = number_before(line, " bytes spill stores");
            report.spill_loads = number_before(line, " bytes spill loads");
        } else if let Some(report) = current.as_ref().and_then(|entry| reports.get_mut(entry))
            && line.contains(" registers")
        {
            report.registers = number_before(line, " registers");
        } else if let Some(said) = said.filter(|said| !is_statistics(said)) {
            remarks.push(said.to_string());
        }
    }
    for remark in remarks {
        let named = reports.keys().find(|entry| remark.contains(&format!("'{entry}'"))).cloned();
        for (entry, report) in &mut reports {
            if named.as_ref().is_none_or(|named| named == entry) {
                report.messages.push(remark.clone());
            }
        }
    }
    reports
}

/// Whether a line is a statistic and no remark: `0 bytes gmem`, `Compile time = 3.1 ms`.
fn is_statistics(said: &str) -> bool {
    said.contains(" bytes gmem") || said.starts_with("Compile time")
}

fn number_before(line: &str, words: &str) -> u32 {
    let before = line.split(words).next().unwrap_or("");
    before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_and_remarks_reach_their_entry() {
        let reports = parse(
            "ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in the function 'a'
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 3.100 ms
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
ptxas warning : something of the module
",
        );
        let a = &reports["a"];
        assert_eq!((a.registers, a.stack, a.spill_stores, a.spill_loads), (168, 16, 4, 8));
        assert!(a.messages[0].starts_with("(C7510)") && a.messages.len() == 2, "{:?}", a.messages);
        let b = &reports["b"];
        assert_eq!((b.registers, b.stack), (32, 0));
        assert_eq!(b.messages, ["something of the module"]);
    }
}
