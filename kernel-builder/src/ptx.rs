//! Reads PTX as text: its entries, and how often each instruction stands there.

use std::collections::BTreeMap;

/// Instructions of a PTX module by opcode with modifiers (`ld.global.v4.u32`) and without
/// predicates, each with its count. Inline assembly counts like any other. Directives, labels and
/// comments do not count.
pub fn histogram(ptx: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (_, statement) in statements(ptx) {
        if let Some(opcode) = opcode(&statement) {
            *counts.entry(opcode.to_string()).or_insert(0) += 1;
        }
    }
    counts
}

/// Names of the entries, in the order of the module.
pub fn entries(ptx: &str) -> Vec<String> {
    let heads = ptx.lines().filter_map(|line| line.split_once(".entry "));
    heads.map(|(_, rest)| rest.chars().take_while(|c| c.is_alphanumeric() || "_$%".contains(*c)).collect()).collect()
}

/// The first number of a directive of an entry: `maxntid` or `minnctapersm`.
pub fn bound(ptx: &str, entry: &str, directive: &str) -> Option<u32> {
    let (_, rest) = ptx.split_once(&format!(".entry {entry}("))?;
    let head = rest.split('{').next()?;
    let (_, value) = head.split_once(&format!(".{directive} "))?;
    value.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The PTX with a name in place of the first number of a directive, which the entry has.
pub(crate) fn with_name(ptx: &str, entry: &str, directive: &str, name: &str) -> String {
    let directive = format!(".{directive} ");
    let entry = ptx.find(&format!(".entry {entry}(")).unwrap_or(ptx.len());
    let Some(at) = ptx[entry..].find(&directive) else { return ptx.to_string() };
    let (head, rest) = ptx.split_at(entry + at + directive.len());
    [head, name, rest.trim_start_matches(|c: char| c.is_ascii_digit())].concat()
}

/// Offset and size in bytes of each parameter of an entry. Each parameter begins at the next
/// multiple of its alignment, as the driver lays them out. `None` if there is no such entry, or if
/// a parameter has an unknown form.
pub fn params(ptx: &str, entry: &str) -> Option<Vec<(u32, u32)>> {
    let (_, rest) = ptx.split_once(&format!(".entry {entry}("))?;
    let list = rest.split(')').next()?;
    let mut end = 0u32;
    let mut found = Vec::new();
    // `.param .align 8 .b8 attention_param_0[104]`, `.param .u64 .ptr .align 1 name_param_0`
    for param in list.split(',').map(str::trim).filter(|param| !param.is_empty()) {
        let words: Vec<&str> = param.split_whitespace().collect();
        let width = words.iter().find_map(|word| {
            let digits = word.strip_prefix('.')?.strip_prefix(['b', 'u', 's', 'f'])?;
            Some(digits.parse::<u32>().ok()? / 8)
        })?;
        let array = words.last()?.split_once('[').map(|(_, count)| count.trim_end_matches(']'));
        let align = match array {
            Some(_) => {
                words.iter().position(|word| *word == ".align").and_then(|at| words.get(at + 1)?.parse().ok())?
            }
            None => width,
        };
        let bytes = array.map_or(Some(1), |count| count.parse().ok())? * width;
        let offset = end.next_multiple_of(align);
        found.push((offset, bytes));
        end = offset + bytes;
    }
    Some(found)
}

/// Instructions that call a function, each with its line, from 1. A kernel should have none.
pub fn calls(ptx: &str) -> Vec<(usize, String)> {
    let calls =
        statements(ptx).into_iter().filter(|(_, text)| opcode(text).is_some_and(|code| code.starts_with("call")));
    calls.map(|(line, text)| (line, text.split_whitespace().collect::<Vec<_>>().join(" "))).collect()
}

/// The statements of a module, each with the line that it begins on. A statement ends with `;` or
/// before the brace of a block. Labels and such braces are statements of their own. Braces within
/// an instruction hold a vector of operands.
pub(crate) fn statements(ptx: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut current = String::new();
    let mut begin = 1;
    for (index, line) in ptx.lines().enumerate() {
        for character in line.split("//").next().unwrap_or("").chars().chain(['\n']) {
            let ends = match character {
                ';' => true,
                '{' | '}' => current.is_empty() || current.starts_with('.'),
                // A label stands alone, and the next statement begins behind it. `::` is part of an
                // opcode.
                '\n' => current.trim_end().ends_with(':'),
                _ => false,
            };
            if ends {
                if !current.trim().is_empty() {
                    found.push((begin, std::mem::take(&mut current)));
                }
                if matches!(character, '{' | '}') {
                    found.push((index + 1, character.to_string()));
                }
            } else if !(current.is_empty() && character.is_whitespace()) {
                if current.is_empty() {
                    begin = index + 1;
                }
                current.push(character);
            }
        }
    }
    found
}

/// The opcode of a statement. A directive and a label have none.
pub(crate) fn opcode(statement: &str) -> Option<&str> {
    let mut words = statement.split_whitespace();
    let mut word = words.next()?;
    while word.ends_with(':') || word.starts_with('@') {
        word = words.next()?;
    }
    let known = word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "._:".contains(c));
    known.then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "//
.version 8.3
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dyn_smem[];
.visible .entry attention(
	.param .align 8 .b8 attention_param_0[104]
)
.maxntid 384, 1, 1
.minnctapersm 2
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [attention_param_0+8];
	// begin inline asm
	{ .reg .pred p; setp.ne.b32 p, %r1, 0; wgmma.fence.sync.aligned; }
	// end inline asm
	st.global.v2.b32 	[%rd1], {%r1, %r2};
	@%p1 bra 	$L__BB0_2;
	bra.uni 	$L__BB0_2;
$L__BB0_2:
	{
	.param .b64 retval0;
	call.uni (retval0),
	memcpy,
	(
	param0
	);
	}
	ret;
}
";

    #[test]
    fn the_histogram_counts_instructions_and_nothing_else() {
        let expected = [
            ("bra", 1),
            ("bra.uni", 1),
            ("call.uni", 1),
            ("ld.param.b64", 1),
            ("ret", 1),
            ("setp.ne.b32", 1),
            ("st.global.v2.b32", 1),
            ("wgmma.fence.sync.aligned", 1),
        ];
        assert_eq!(histogram(PTX), expected.map(|(code, count)| (code.to_string(), count)).into());
    }

    #[test]
    fn parameters_are_laid_out_by_alignment() {
        assert_eq!(params(PTX, "attention"), Some(vec![(0, 104)]));
        let scalars = ".entry f(\n\t.param .u32 f_param_0,\n\t.param .u64 .ptr .align 1 f_param_1,\n\t.param .b8 f_param_2\n)\n{}";
        assert_eq!(params(scalars, "f"), Some(vec![(0, 4), (8, 8), (16, 1)]));
        assert_eq!(params(".entry g()\n{}", "g"), Some(vec![]));
        assert_eq!(params(scalars, "g"), None);
    }

    #[test]
    fn entries_bounds_and_calls_are_found() {
        assert_eq!(entries(PTX), ["attention"]);
        assert_eq!(bound(PTX, "attention", "maxntid"), Some(384));
        assert_eq!(bound(PTX, "attention", "minnctapersm"), Some(2));
        assert_eq!(bound(PTX, "attention", "maxnreg"), None);
        assert_eq!(calls(PTX), [(24, "call.uni (retval0), memcpy, ( param0 )".to_string())]);
    }
}
