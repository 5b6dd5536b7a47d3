//! The layers that `verify` runs.

use framestride::shapes::layout::{HeadType, Layout};
use framestride::shapes::spec::Spec;
use rand::{Rng, RngExt};

use crate::device_tensors::{Arrangement, Placement};
use crate::tensors::Inputs;

/// Where the types of the heads come from in one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseTypes {
    /// All heads are dense.
    Dense,
    /// All heads have this type, which is given.
    All(HeadType),
    /// Heads are dense, spatial and temporal in turn. The types are given.
    Mixed,
    /// The device profiles the heads.
    Profiled,
}

/// How much of the text on one side of the video is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseText {
    /// All of it. No lengths are given.
    Full,
    /// All of it. The lengths are given.
    FullGiven,
    /// Some of it: another number for each batch item.
    Partial,
    /// None of it.
    Empty,
    /// Given lengths are longer than the text. The kernels must take them for all of it.
    Beyond,
}

impl CaseText {
    /// Valid text tokens of each batch item, where the side has `text` of them.
    pub(super) fn lengths(self, text: u32, batch: u32, generator: &mut impl Rng) -> Option<Vec<u32>> {
        match self {
            CaseText::Full => None,
            CaseText::FullGiven => Some(vec![text; batch as usize]),
            CaseText::Partial => {
                // Batch items get different lengths, as long as there are different ones.
                let first = generator.random_range(0..text.max(1));
                Some((0..batch).map(|item| (first + item * (text / 2).max(1)) % text.max(1)).collect())
            }
            CaseText::Empty => Some(vec![0; batch as usize]),
            CaseText::Beyond => Some((0..batch).map(|item| [u32::MAX, text + 1][item as usize % 2]).collect()),
        }
    }
}

/// What Q, K and V hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseContent {
    /// [`Inputs::random`].
    Random,
    /// [`Inputs::sudden`].
    Sudden,
    /// [`Inputs::planted`].
    Planted,
    /// [`Inputs::rising`].
    Rising,
    /// [`Inputs::lone`].
    Lone,
    /// [`Inputs::hidden`].
    Hidden,
    /// [`Inputs::constant`].
    Constant,
    /// [`Inputs::edges`].
    Edges,
    /// [`Inputs::off_centre`].
    OffCentre,
    /// [`Inputs::large_text`].
    LargeText,
    /// [`Inputs::drifting`].
    Drifting,
    /// [`Inputs::rough`].
    Rough,
}

impl CaseContent {
    /// Makes the inputs of a launch with `batch` items of `heads` heads.
    pub(super) fn make(self, spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let make = match self {
            CaseContent::Random => Inputs::random,
            CaseContent::Sudden => Inputs::sudden,
            CaseContent::Planted => Inputs::planted,
            CaseContent::Rising => Inputs::rising,
            CaseContent::Lone => Inputs::lone,
            CaseContent::Hidden => Inputs::hidden,
            CaseContent::Constant => Inputs::constant,
            CaseContent::Edges => Inputs::edges,
            CaseContent::OffCentre => Inputs::off_centre,
            CaseContent::LargeText => Inputs::large_text,
            CaseContent::Drifting => Inputs::drifting,
            CaseContent::Rough => Inputs::rough,
        };
        make(spec, batch, heads, seed)
    }
}

/// How many batch items and heads are launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseExtent {
    /// Those of the spec.
    Spec,
    /// Another batch, and fewer heads, where the spec allows it.
    Fewer,
    /// More heads than a warp of **pack** holds of a row of the spec's, where the spec allows it.
    More,
}

/// One run of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Types of the heads.
    pub types: CaseTypes,
    /// Valid text before the video and after it.
    pub text: [CaseText; 2],
    /// What Q, K and V hold.
    pub content: CaseContent,
    /// How many batch items and heads are launched.
    pub extent: CaseExtent,
    /// How the tensors lie in memory.
    pub placement: Placement,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
    /// Whether the launch gives the seed of the sampled rows, which is that of the case's inputs.
    pub seeded: bool,
    /// Whether the launch gives precisions, 8 and 16 bits in turn, where the spec has a bound.
    pub gives_precisions: bool,
}

impl Case {
    /// A case whose text is all valid, with the spec's batch and heads, tensors of \[B, S, H, D\],
    /// and a log-sum-exp. Precisions are given, unless the heads are profiled.
    pub const fn new(types: CaseTypes, content: CaseContent) -> Case {
        Case {
            types,
            text: [CaseText::Full; 2],
            content,
            extent: CaseExtent::Spec,
            placement: Placement::all(Arrangement::TokensFirst),
            lse: true,
            seeded: false,
            gives_precisions: !matches!(types, CaseTypes::Profiled),
        }
    }

    /// The cases of `verify`.
    ///
    /// Masks come alone and all together. Every arrangement and content occurs, and every length of
    /// text on each side, alike on both and not. The text of each side lies with the video and apart,
    /// and once it is all that is unaligned. Two cases have another batch with fewer heads, and one
    /// has more. One gives a seed of the sampled rows. Contents that are about the softmax's offsets
    /// occur with given types and profiled. Where the spec has a bound of precisions, one case gives neither
    /// them nor types, and one gives them to heads that are profiled. With `is_emulated`, rows are scattered where a GPU has
    /// unaligned ones.
    pub fn all(layout: &Layout, is_emulated: bool) -> [Case; 16] {
        use Arrangement::{HeadsFirst, PackedQkv, TokensFirst};
        let unaligned = if is_emulated { Arrangement::Scattered } else { Arrangement::Unaligned };
        use CaseContent::{
            Constant, Drifting, Edges, Hidden, LargeText, Lone, OffCentre, Planted, Random, Rising, Rough, Sudden,
        };
        use CaseText::{Beyond, Empty, Full, FullGiven, Partial};
        use CaseTypes::{All, Dense, Mixed, Profiled};
        let cases = [
            Case { text: [Empty; 2], ..Case::new(Dense, Lone) },
            Case {
                text: [Partial; 2],
                extent: CaseExtent::Fewer,
                placement: Placement { text: [Some(TokensFirst), None], ..Placement::all(HeadsFirst) },
                ..Case::new(Mixed, Random)
            },
            Case {
                text: [Beyond; 2],
                placement: Placement { inputs: PackedQkv, text: [None, Some(PackedQkv)], out: TokensFirst },
                lse: false,
                gives_precisions: false,
                ..Case::new(All(HeadType::Temporal), Random)
            },
            Case { text: [Empty; 2], placement: Placement::all(unaligned), ..Case::new(Mixed, Sudden) },
            Case {
                text: [Partial; 2],
                extent: CaseExtent::Fewer,
                placement: Placement {
                    inputs: TokensFirst,
                    text: [Some(unaligned), Some(HeadsFirst)],
                    out: HeadsFirst,
                },
                seeded: true,
                ..Case::new(Profiled, Random)
            },
            Case::new(Profiled, Planted),
            Case {
                text: [Empty, Partial],
                extent: CaseExtent::More,
                placement: Placement { text: [Some(PackedQkv), Some(unaligned)], ..Placement::all(TokensFirst) },
                ..Case::new(Mixed, Rising)
            },
            Case { text: [Partial, Full], ..Case::new(Profiled, Rising) },
            Case { text: [FullGiven, Full], ..Case::new(Mixed, Edges) },
            Case { text: [Empty; 2], ..Case::new(Profiled, Sudden) },
            Case { text: [Full, FullGiven], ..Case::new(Profiled, Constant) },
            Case { text: [Empty; 2], gives_precisions: true, ..Case::new(Profiled, Hidden) },
            Case { text: [Partial; 2], ..Case::new(Mixed, OffCentre) },
            Case { text: [FullGiven, Partial], ..Case::new(Mixed, LargeText) },
            Case::new(Dense, Drifting),
            Case { text: [Partial; 2], ..Case::new(Profiled, Rough) },
        ];
        // A side without text has neither lengths nor tensors.
        cases.map(|mut case| {
            for (side, tokens) in [layout.before, layout.after].into_iter().enumerate() {
                if tokens == 0 {
                    (case.text[side], case.placement.text[side]) = (Full, None);
                }
            }
            case
        })
    }

    /// Batch items and heads of the launch, for a spec.
    pub fn launch_extent(&self, spec: &Spec) -> [u32; 2] {
        let Spec { batch, heads, .. } = *spec;
        let (fixed, most) = (spec.norm_is_over_heads(), spec.most_launch_heads());
        match self.extent {
            CaseExtent::Spec => [batch, heads],
            // A step has up to four heads, and the last of the spec's may be filled with others.
            CaseExtent::More if !fixed && batch * (heads + 4) <= most => [batch, heads + 4],
            CaseExtent::More => [batch, heads],
            CaseExtent::Fewer if !fixed && heads > 1 && (batch + 1) * (heads - 1) <= most => [batch + 1, heads - 1],
            CaseExtent::Fewer if batch > 1 => [batch - 1, heads],
            CaseExtent::Fewer => [if 2 * heads <= most { 2 } else { 1 }, heads],
        }
    }

    /// What reports call the case.
    pub(super) fn describe(&self) -> String {
        let types = match self.types {
            CaseTypes::Dense => "dense",
            CaseTypes::All(head) => head.name(),
            CaseTypes::Mixed => "mixed types",
            CaseTypes::Profiled => "profiled",
        };
        let content = match self.content {
            CaseContent::Random => "",
            CaseContent::Sudden => ", scores that are small but for one",
            CaseContent::Planted => ", planted heads",
            CaseContent::Rising => ", rising scores",
            CaseContent::Lone => ", lone rows that need offsets",
            CaseContent::Hidden => ", a hidden key above all",
            CaseContent::Constant => ", equal scores and constant values",
            CaseContent::Edges => ", keys at the edges above all",
            CaseContent::OffCentre => ", keys and values that are not centered",
            CaseContent::LargeText => ", large values in text",
            CaseContent::Drifting => ", values whose mean changes",
            CaseContent::Rough => ", 8 bits too rough for every other head",
        };
        let text_of = |text| match text {
            CaseText::Full => "",
            CaseText::FullGiven => ", full text",
            CaseText::Partial => ", partial text",
            CaseText::Empty => ", no valid text",
            CaseText::Beyond => ", text lengths beyond the text",
        };
        let text = match self.text {
            [text, CaseText::Full] | [CaseText::Full, text] => text_of(text).to_owned(),
            [before, after] if before == after => text_of(before).to_owned(),
            [before, after] => format!("{} before{} after", text_of(before), text_of(after)),
        };
        let shape = match self.extent {
            CaseExtent::Spec => "",
            CaseExtent::Fewer => ", another batch and fewer heads",
            CaseExtent::More => ", more heads",
        };
        let lse = if self.lse { "" } else { ", no log-sum-exp" };
        let seed = if self.seeded { ", a seed of its own" } else { "" };
        let arrangement = |arrangement| match arrangement {
            Arrangement::TokensFirst => "[B,S,H,D]",
            Arrangement::HeadsFirst => "[B,H,S,D]",
            Arrangement::PackedQkv => "[B,S,3,H,D]",
            Arrangement::Unaligned => "unaligned",
            Arrangement::Scattered => "scattered",
        };
        let Placement { inputs, text: apart, out } = self.placement;
        let (inputs, out) = (arrangement(inputs), arrangement(out));
        let apart = match apart {
            [None, None] => String::new(),
            [Some(text), None] | [None, Some(text)] => format!(" and text apart {}", arrangement(text)),
            [Some(before), Some(after)] => {
                format!(" and text apart {} before, {} after", arrangement(before), arrangement(after))
            }
        };
        format!("{types}{content}{text}{shape}{lse}{seed}, {inputs}{apart} to {out}")
    }
}
