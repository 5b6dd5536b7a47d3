//! The shipped specs against a table of the models, which was gathered from their papers and their
//! authors' code.

use framestride_shapes::models;
use framestride_shapes::spec::{NormKind, NormOver, Pairs, QkNorm, Rope, Spec};

/// What a spec must say.
struct Row {
    name: &'static str,
    /// Frames, tokens per frame, text tokens, and the sum of all tokens.
    sequence: [u32; 4],
    /// Heads, and channels of a head.
    heads: [u32; 2],
    norm: QkNorm,
    rope: Rope,
}

const fn rms(eps: f64) -> QkNorm {
    QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps }
}

const fn rms_over_heads(eps: f64) -> QkNorm {
    QkNorm { kind: NormKind::Rms, over: NormOver::Heads, eps }
}

const LAYER: QkNorm = QkNorm { kind: NormKind::Layer, over: NormOver::Head, eps: 1e-6 };

/// RoPE of all channels, with one table for all heads, of video tokens.
const fn rope(pairs: Pairs, channels: u32) -> Rope {
    Rope { pairs, channels, before: false, after: false, per_head: false }
}

const fn per_head(rope: Rope) -> Rope {
    Rope { per_head: true, ..rope }
}

const INTERLEAVED: Rope = rope(Pairs::Interleaved, 128);
const HALF: Rope = rope(Pairs::Half, 128);
/// The first 96 of 128 channels of all rows.
const MINIMAX: Rope = Rope { pairs: Pairs::Half, channels: 96, before: true, after: false, per_head: false };

const fn row(name: &'static str, sequence: [u32; 4], heads: [u32; 2], norm: QkNorm, rope: Rope) -> Row {
    Row { name, sequence, heads, norm, rope }
}

const ROWS: [Row; 27] = [
    row("cogvideox_1_5_5b_768x1360", [11, 4080, 226, 45_106], [48, 64], LAYER, rope(Pairs::Interleaved, 64)),
    row("cogvideox_5b_480x720", [13, 1350, 226, 17_776], [48, 64], LAYER, rope(Pairs::Interleaved, 64)),
    row("cosmos_1_14b_704x1280", [16, 3520, 0, 56_320], [40, 128], rms(1e-6), HALF),
    row("cosmos_predict_2_5_14b_704x1280", [24, 3520, 0, 84_480], [40, 128], rms(1e-6), HALF),
    row("cosmos_predict_2_5_2b_704x1280", [24, 3520, 0, 84_480], [16, 128], rms(1e-6), HALF),
    row("hunyuan_custom_720p", [33, 3600, 4431, 123_231], [24, 128], rms(1e-6), Rope { before: true, ..INTERLEAVED }),
    row("hunyuan_video_1_5_720p", [31, 3600, 1985, 113_585], [16, 128], rms(1e-6), INTERLEAVED),
    row("hunyuan_video_544x960", [33, 2040, 256, 67_576], [24, 128], rms(1e-6), INTERLEAVED),
    row("hunyuan_video_720p", [33, 3600, 256, 119_056], [24, 128], rms(1e-6), INTERLEAVED),
    row("kandinsky_5_lite_512x768", [31, 1536, 0, 47_616], [28, 64], rms(1.1920929e-7), rope(Pairs::Interleaved, 64)),
    row("kandinsky_5_pro_768x1280", [31, 3840, 0, 119_040], [32, 128], rms(1.1920929e-7), INTERLEAVED),
    row("longcat_video_480x832", [24, 1560, 0, 37_440], [32, 128], rms(1e-6), INTERLEAVED),
    row("ltx_2_1088x1920", [16, 2040, 0, 32_640], [32, 128], rms_over_heads(1e-6), per_head(INTERLEAVED)),
    row("ltx_2_512x768", [16, 384, 0, 6144], [32, 128], rms_over_heads(1e-6), per_head(INTERLEAVED)),
    row("ltx_2_5_1088x1920", [16, 2040, 0, 32_640], [32, 128], rms_over_heads(1e-6), per_head(HALF)),
    row("ltx_2_5_2176x3840", [16, 8160, 0, 130_560], [32, 128], rms_over_heads(1e-6), per_head(HALF)),
    row(
        "ltx_video_512x704",
        [21, 352, 0, 7392],
        [32, 64],
        rms_over_heads(1e-5),
        per_head(rope(Pairs::Interleaved, 64)),
    ),
    row("minimax_h3_10s_768x1344", [72, 1008, 840, 73_416], [56, 128], rms(1e-5), MINIMAX),
    row("minimax_h3_14s_768x1344", [102, 1008, 1234, 104_050], [56, 128], rms(1e-5), MINIMAX),
    row("minimax_h3_15s_768x1344", [107, 1008, 1290, 109_146], [56, 128], rms(1e-5), MINIMAX),
    row("minimax_h3_5s_768x1344", [37, 1008, 444, 37_740], [56, 128], rms(1e-5), MINIMAX),
    row("mochi_1_480x848", [28, 1590, 256, 44_776], [24, 128], rms(1e-5), per_head(INTERLEAVED)),
    row("motif_video_2b_736x1280", [31, 3680, 512, 114_592], [12, 128], rms(1e-6), INTERLEAVED),
    row("wan_14b_720p", [21, 3600, 0, 75_600], [40, 128], rms_over_heads(1e-6), INTERLEAVED),
    row("wan_2_1_1_3b_480p", [21, 1560, 0, 32_760], [12, 128], rms_over_heads(1e-6), INTERLEAVED),
    row("wan_2_2_ti2v_5b_704x1280", [31, 880, 0, 27_280], [24, 128], rms_over_heads(1e-6), INTERLEAVED),
    row("wan_vace_14b_720p", [22, 3600, 0, 79_200], [40, 128], rms_over_heads(1e-6), INTERLEAVED),
];

#[test]
fn specs_are_those_of_the_models() {
    let specs: Vec<Spec> = models()
        .iter()
        .filter(|(name, _)| *name != "demo" && !name.starts_with("tiny_"))
        .map(|(name, text)| Spec::parse(name, text).unwrap_or_else(|error| panic!("{error}")))
        .collect();
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names, ROWS.map(|row| row.name), "every spec has a row, in the same order");
    for (spec, Row { name, sequence, heads, norm, rope }) in specs.iter().zip(ROWS) {
        let layout = &spec.layout;
        let found = [layout.frames.value, layout.tokens_per_frame.value, layout.text_tokens(), layout.sequence()];
        assert_eq!((found, [spec.heads, spec.head_dim]), (sequence, heads), "{name}");
        assert_eq!((spec.qk_norm, spec.rope), (Some(norm), Some(rope)), "{name}");
        assert!(spec.grid.is_some() && spec.schedule.steps > 0, "{name} has a grid and a schedule");
    }
}
