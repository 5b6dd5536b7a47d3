//! Templates of kernels, whose numbers are filled in when a spec is loaded.
//!
//! There is one for each family of GPUs, element type, head dim and type of products
//! ([`Template`](framestride_shapes::numbers::Template)). Where kernels know a number of the spec, the
//! PTX of a template has a name ([`framestride_shapes::numbers`]).

use std::collections::HashMap;
use std::io::Read;

use flate2::read::GzDecoder;
use framestride_shapes::arch::Arch;
use framestride_shapes::blocks::PackBlock;
use framestride_shapes::dtype::Compute;
use framestride_shapes::manifest::{Densities, Manifest};
use framestride_shapes::numbers::{Numbers, PREFIX, Template};
use framestride_shapes::shared::PackShared;
use framestride_shapes::spec::Spec;

use crate::error::{Error, Result};
use crate::launch::Kernel;
use crate::module::sha256;

/// The name, the compressed PTX and the manifest of each template.
const TEMPLATES: [(&str, &[u8], &str); 10] = {
    macro_rules! templates {
        ($($name:literal),*) => {
            [$((
                $name,
                include_bytes!(concat!("../kernels/", $name, ".ptx.gz")),
                include_str!(concat!("../kernels/", $name, ".json")),
            )),*]
        };
    }
    templates![
        "sm_90a_bf16_64",
        "sm_90a_f16_64",
        "sm_90a_bf16_128",
        "sm_90a_f16_128",
        "sm_90a_bf16_128_e4m3",
        "sm_90a_f16_128_e4m3",
        "sm_80_bf16_64",
        "sm_80_f16_64",
        "sm_80_bf16_128",
        "sm_80_f16_128"
    ]
};

/// The PTX of the spec's templates with the numbers of the spec, and its manifest.
///
/// A template in 8 bits has only what the one in 16 bits has not. So a spec whose heads multiply in 8 bits
/// gets both, in one module. What it does not need is left out, since the driver compiles everything.
pub(crate) fn fill(spec: &Spec, arch: Arch) -> Result<(String, Manifest)> {
    let template = spec.template();
    if !template.is_of(arch) {
        let found = format!("{:?} with kernels of {}", template.compute.as_str(), arch.name);
        let mend = "Write compute = \"dtype\" in the spec, or take kernels of sm_90a, on a Hopper or the emulator";
        return Err(Error::input("attention.compute", found, "\"e4m3\" on sm_90a, \"dtype\" on every family", mend));
    }
    let literals: HashMap<String, u32> = Numbers::of(spec, arch).literals().into_iter().collect();
    let (mut body, mut manifest) = filled(arch, Template { compute: Compute::Dtype, ..template }, &literals)?;
    if template.compute == Compute::E4m3 {
        let (other, Manifest { kernels, .. }) = filled(arch, template, &literals)?;
        // Both begin with the same directives.
        body += other.split_once(SHARED).map_or("", |(_, entries)| entries);
        manifest.kernels.extend(kernels);
    }
    let is_needed = |entry: &str| Kernel::ALL.iter().any(|kernel| kernel.entry() == entry && kernel.is_of(spec));
    manifest.kernels.retain(|kernel| is_needed(&kernel.entry));
    let body = with_entries(&body, is_needed);
    let pack = PackBlock::new(arch, spec.heads, spec.image());
    for kernel in &mut manifest.kernels {
        if [Kernel::Pack, Kernel::PackE4m3].map(Kernel::entry).contains(&kernel.entry.as_str()) {
            kernel.threads = pack.threads();
            kernel.min_blocks = pack.min_blocks;
            kernel.shared_bytes = PackShared::new(pack.warps, pack.held_steps).bytes;
        }
    }
    manifest.name.clone_from(&spec.name);
    manifest.spec = Some(spec.source.text.clone());
    manifest.densities = Some(Densities::of(spec));
    manifest.workspace_bytes = Some(spec.workspace(spec.batch, spec.heads, 1).bytes);
    let ptx = format!("{}\n{body}", manifest.statement());
    manifest.ptx_sha256 = sha256(&ptx);
    Ok((ptx, manifest))
}

/// The last directive of a template before its entries, which all of them share.
const SHARED: &str = ".extern .shared .align 1024 .b8 dyn_smem[];\n";

/// One template with numbers in place of names, but for its first line, and its manifest.
fn filled(arch: Arch, template: Template, literals: &HashMap<String, u32>) -> Result<(String, Manifest)> {
    let wanted = format!("{}_{}", arch.name, template.name());
    let Some((name, compressed, manifest)) = TEMPLATES.into_iter().find(|(name, ..)| *name == wanted) else {
        let names = TEMPLATES.map(|(name, ..)| name).join(", ");
        return Err(Error::input("template", wanted, names, "Build kernels of this spec with `framestride build`"));
    };
    let damaged = |found: String| {
        Error::input(
            format!("template {name}"),
            found,
            "the template that this version was built with",
            "Install it again",
        )
    };
    let mut text = String::new();
    GzDecoder::new(compressed).read_to_string(&mut text).map_err(|error| damaged(error.to_string()))?;
    // Its first line says what it was made for, which is another thing now.
    let body = text.split_once('\n').map_or("", |(_, body)| body);
    let body = with_numbers(body, literals)
        .map_err(|unknown| damaged(format!("{PREFIX}{unknown}, which is no number of a spec")))?;
    Ok((body, Manifest::parse(name, manifest)?))
}

/// The text of some entries, and what comes before the first.
fn with_entries(ptx: &str, is_needed: impl Fn(&str) -> bool) -> String {
    const ENTRY: &str = ".visible .entry ";
    let mut parts = ptx.split(ENTRY);
    let mut kept = parts.next().unwrap_or("").to_string();
    for part in parts.filter(|part| part.split_once('(').is_some_and(|(entry, _)| is_needed(entry))) {
        kept += ENTRY;
        kept += part;
    }
    kept
}

/// A template's text with a number in place of each name. The error is a name that has none.
fn with_numbers<'a>(template: &'a str, literals: &HashMap<String, u32>) -> Result<String, &'a str> {
    let mut parts = template.split(PREFIX);
    let mut filled = String::with_capacity(template.len());
    filled += parts.next().unwrap_or("");
    for part in parts {
        let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        filled += &literals.get(name).ok_or(name)?.to_string();
        filled += rest;
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_names_are_filled_in() {
        let numbers = Numbers { after_tokens: 7, norm_eps: 1.0, ..Numbers::default() };
        let numbers = numbers.literals().into_iter().collect();
        let filled = with_numbers("mov.u32 %r1, FS_after_tokens;\n.maxntid FS_frames_shift\nFS_norm_eps", &numbers);
        assert_eq!(filled.unwrap(), format!("mov.u32 %r1, 7;\n.maxntid 0\n{}", 1f32.to_bits()));
        // `after_tokens` is a prefix of this name.
        assert_eq!(with_numbers("FS_after_tokens_more;", &numbers), Err("after_tokens_more"));
    }

    /// A module has the kernels that its spec needs, in the order of its manifest.
    #[test]
    fn kernels_of_precisions() {
        let sixteen = ["attention", "pack", "profile", "select"];
        let eight = ["attention_e4m3", "center", "pack_e4m3", "pack_values"];
        let bound = Spec::shipped("tiny_e4m3").unwrap();
        let with = |compute| bound.to_builder().largest_error(None).compute(compute).build().unwrap();
        for (spec, expected) in [
            (with(Compute::Dtype), sixteen.to_vec()),
            (with(Compute::E4m3), [&sixteen[1..], &eight[..]].concat()),
            (bound.clone(), [&sixteen[..], &eight[..2], &["judge"], &eight[2..]].concat()),
        ] {
            let (ptx, manifest) = fill(&spec, Arch::SM_90A).unwrap();
            let of_manifest: Vec<&str> = manifest.kernels.iter().map(|kernel| kernel.entry.as_str()).collect();
            let entries = ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.strip_suffix('('));
            assert_eq!(entries.collect::<Vec<_>>(), expected);
            assert_eq!(of_manifest, expected);
            assert_eq!(ptx.matches(SHARED).count(), 1);
        }
    }

    #[test]
    fn templates_are_whole() {
        for (name, compressed, manifest) in TEMPLATES {
            let mut ptx = String::new();
            GzDecoder::new(compressed).read_to_string(&mut ptx).unwrap();
            let manifest = Manifest::parse(name, manifest).unwrap();
            assert_eq!((manifest.name.as_str(), &manifest.ptx_sha256), (name, &sha256(&ptx)));
            assert_eq!(manifest.mismatch(&ptx), None);
            assert_eq!(ptx.matches(SHARED).count(), 1, "{name}");
        }
        let of = |arch: Arch| {
            Template::ALL.into_iter().filter(move |template| template.is_of(arch)).map(move |template| (arch, template))
        };
        let all =
            Arch::ALL.into_iter().flat_map(of).map(|(arch, template)| format!("{}_{}", arch.name, template.name()));
        assert!(all.eq(TEMPLATES.iter().map(|(name, ..)| *name)), "one for each template of each family");
    }
}
