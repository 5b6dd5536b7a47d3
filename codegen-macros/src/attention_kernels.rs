//! `attention_kernels!`: turns a spec, from its file or spelled out, into constants and kernel
//! entries.
//!
//! The spelled-out form becomes the lines of a TOML file, which the same parser reads. So both
//! forms have the same keys, defaults and checks. An error of a line is reported at the tokens that
//! it came from.

use framestride_shapes::arch::{Arch, Products};
use framestride_shapes::blocks::{PROFILE_COLUMNS, PROFILE_KEY_ROWS, PROFILE_THREADS, PackBlock, SELECT_THREADS};
use framestride_shapes::dtype::Dtype;
use framestride_shapes::layout::TextPosition;
use framestride_shapes::norm_rope::{NormKind, NormOver, Pairs, QkNorm, Rope};
use framestride_shapes::shared::{AttentionShared, PackShared, ProfileShared, SelectShared};
use framestride_shapes::spec::{Lines, Problem, Spec, SpecError};
use proc_macro2::{Ident, Literal, Span, TokenStream};
use quote::quote;
use std::path::PathBuf;
use syn::parse::{Parse, ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{Error, Expr, LitStr, Result, Token, braced};

pub fn expand(input: TokenStream) -> Result<TokenStream> {
    let parse = |input: ParseStream| {
        let krate = crate::kernels_crate(input)?;
        let is_file = input.peek(syn::Ident) && input.fork().parse::<Ident>()? == "spec";
        Ok((krate, if is_file { from_file(input) } else { spelled_out(input) }?))
    };
    let (krate, Shape { spec, text, file }) = parse.parse2(input)?;
    let kernels = kernels(&krate, &spec, file.as_deref());
    let (length, bytes) = (text.len(), Literal::byte_string(text.as_bytes()));
    Ok(quote! {
        #kernels

        #[doc(hidden)]
        #[used]
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        pub static framestride_spec: [u8; #length] = *#bytes;
    })
}

/// What the macro was given.
struct Shape {
    spec: Spec,
    /// The spec as TOML. The builder takes it out of the LLVM IR and copies it to the manifest.
    text: String,
    /// The file in which it stands. When that changes, the crate must be built again.
    file: Option<String>,
}

/// `spec = "path"`.
fn from_file(input: ParseStream) -> Result<Shape> {
    input.parse::<Ident>()?;
    input.parse::<Token![=]>()?;
    let path: LitStr = input.parse()?;
    input.parse::<Option<Token![,]>>()?;
    if !input.is_empty() {
        return Err(input.error("nothing may follow the path: the file states the whole shape"));
    }
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let file = root.join(path.value());
    let spec = Spec::from_file(&file).map_err(|error| {
        // Messages have the path as the user wrote it, not where this build happens to stand.
        let lines = error.problems.iter().map(|problem| match problem.line {
            0 => format!("{}: {}", path.value(), message(problem).trim_start()),
            line => format!("{}:{line}: {}", path.value(), message(problem)),
        });
        Error::new(path.span(), lines.collect::<Vec<_>>().join("\n"))
    })?;
    let text = std::fs::read_to_string(&file).map_err(|error| Error::new(path.span(), error))?;
    Ok(Shape { spec, text, file: Some(file.display().to_string()) })
}

/// `name = value`, or `name = kind { name = value, ... }`.
struct Entry {
    name: Ident,
    value: Option<Expr>,
    kind: Option<Ident>,
    inner: Vec<Entry>,
}

impl Parse for Entry {
    fn parse(input: ParseStream) -> Result<Entry> {
        let name: Ident = input.parse()?;
        input.parse::<Token![=]>()?;
        let (mut value, mut kind, mut inner) = (None, None, Vec::new());
        if input.peek(syn::Ident) && !input.peek(syn::LitBool) {
            kind = Some(input.parse()?);
        } else if !input.peek(syn::token::Brace) {
            value = Some(input.parse()?);
        }
        if value.is_none() && input.peek(syn::token::Brace) {
            let body;
            braced!(body in input);
            inner = body.parse_terminated(Entry::parse, Token![,])?.into_iter().collect();
        }
        Ok(Entry { name, value, kind, inner })
    }
}

impl Entry {
    /// The value as TOML writes it.
    fn toml(&self) -> String {
        match (&self.value, &self.kind) {
            (Some(value), _) => quote!(#value).to_string(),
            (None, Some(kind)) => format!("{:?}", kind.to_string()),
            (None, None) => "{}".into(),
        }
    }

    fn span(&self) -> Span {
        let value = self.value.as_ref().map(Spanned::span).or(self.kind.as_ref().map(Ident::span));
        value.unwrap_or_else(|| self.name.span())
    }
}

fn spelled_out(input: ParseStream) -> Result<Shape> {
    let whole = input.span();
    let mut lines = Lines::new();
    let mut named = false;
    for entry in input.parse_terminated(Entry::parse, Token![,])? {
        let name = entry.name.to_string();
        // The kind of such a table stands before its braces: `rope = half { text = true }`.
        let table = match name.as_str() {
            "text" => Some(("text".to_string(), Some("position"))),
            "qk_norm" => Some(("qk_norm".to_string(), Some("kind"))),
            "rope" => Some(("rope".to_string(), Some("pairs"))),
            "profile" | "schedule" => Some((name.clone(), None)),
            "mask" => {
                Some((format!("masks.{}", entry.kind.as_ref().map(ToString::to_string).unwrap_or_default()), None))
            }
            _ => None,
        };
        if let Some((table, kind_key)) = table {
            if let Some(value) = &entry.value {
                let message = format!("`{name}` is a table: write `{name} = kind {{ key = value }}`");
                return Err(Error::new_spanned(value, message));
            }
            if name == "mask" && entry.kind.is_none() {
                return Err(Error::new(entry.name.span(), "write `mask = spatial { .. }` or `mask = temporal { .. }`"));
            }
            lines.table(&table);
            if let (Some(key), Some(kind)) = (kind_key, &entry.kind) {
                lines.push(&table, key, &format!("{:?}", kind.to_string()), kind.span());
            }
            for inner in &entry.inner {
                lines.push(&table, &inner.name.to_string(), &inner.toml(), inner.span());
            }
            continue;
        }
        let (table, key) = match name.as_str() {
            "name" => ("", "name"),
            "frames" | "tokens_per_frame" | "grid" => ("video", name.as_str()),
            "heads" | "head_dim" | "dtype" | "batch" => ("attention", name.as_str()),
            "sink_frames" => ("sink", "frames"),
            _ => {
                let message = format!(
                    "unknown key `{name}`; allowed: spec, name, frames, tokens_per_frame, grid, text, heads, head_dim, dtype, \
                     batch, qk_norm, rope, mask, sink_frames, profile, schedule"
                );
                return Err(Error::new(entry.name.span(), message));
            }
        };
        named |= key == "name";
        lines.push(table, key, &entry.toml(), entry.span());
    }
    if !named {
        lines.push("", "name", "\"spelled_out\"", whole);
    }
    let (text, spans) = lines.text(whole);
    let spec = Spec::parse("attention_kernels!", &text).map_err(|error| at_tokens(error, &spans, whole))?;
    Ok(Shape { spec, text, file: None })
}

fn message(problem: &Problem) -> String {
    format!("{} {}; allowed: {}; {}", problem.key, problem.found, problem.allowed, problem.mend)
}

/// Reports each problem of a spec at the tokens that its line came from.
fn at_tokens(error: SpecError, spans: &[Span], whole: Span) -> Error {
    let mut errors = error.problems.iter().map(|problem| {
        let span = spans.get((problem.line as usize).wrapping_sub(1)).copied().unwrap_or(whole);
        Error::new(span, message(problem))
    });
    let mut all = errors.next().unwrap_or_else(|| Error::new(whole, "the shape is not valid"));
    errors.for_each(|error| all.combine(error));
    all
}

/// The model's constants and the entries. `krate` is the path of `framestride_kernels`.
fn kernels(krate: &TokenStream, spec: &Spec, file: Option<&str>) -> TokenStream {
    let layout = &spec.layout;
    let text_position = match layout.text_position {
        TextPosition::First => quote!(First),
        TextPosition::Last => quote!(Last),
    };
    let (frames, tokens_per_frame, text_tokens) = (layout.frames, layout.tokens_per_frame, layout.text_tokens);
    let (sink_frames, spatial, temporal) = (layout.sink_frames, layout.spatial_half_width, layout.temporal_half_width);
    let (heads, head_dim, rows) = (spec.heads, spec.head_dim, spec.profile.rows);
    let tiles = spec.tiles();
    let (query_rows, key_rows, stages) = (tiles.query_rows, tiles.key_rows, tiles.stages);
    let element = match spec.dtype {
        Dtype::Bf16 => quote!(Bf16),
        Dtype::F16 => quote!(F16),
    };
    let norm_rope = quote!(#krate::shapes::norm_rope);
    let qk_norm = match spec.qk_norm {
        None => quote!(None),
        Some(QkNorm { kind, over, eps }) => {
            let kind = match kind {
                NormKind::Rms => quote!(Rms),
                NormKind::Layer => quote!(Layer),
            };
            let over = match over {
                NormOver::Head => quote!(Head),
                NormOver::Heads => quote!(Heads),
            };
            quote!(Some(#norm_rope::QkNorm { kind: #norm_rope::NormKind::#kind, over: #norm_rope::NormOver::#over, eps: #eps }))
        }
    };
    let rope = match spec.rope {
        None => quote!(None),
        Some(Rope { pairs, channels, text, per_head }) => {
            let pairs = match pairs {
                Pairs::Interleaved => quote!(Interleaved),
                Pairs::Half => quote!(Half),
            };
            quote!(Some(#norm_rope::Rope {
                pairs: #norm_rope::Pairs::#pairs,
                channels: #channels,
                text: #text,
                per_head: #per_head,
            }))
        }
    };
    let image = spec.image();
    // Bodies are named for the first family that they were written for.
    let family = match Arch::default().products {
        Products::Wgmma => quote!(sm90),
    };
    let pack = PackBlock::new(heads, image);
    let (pack_threads, pack_blocks, pack_shared) =
        (pack.threads(), pack.min_blocks, PackShared::new(pack.warps, pack.held_steps).bytes);
    let (profile_shared, select_shared) = (ProfileShared::new(image).bytes, SelectShared::new(SELECT_THREADS).bytes);
    let (attention_threads, attention_shared) = (tiles.threads(), AttentionShared::new(tiles, image).bytes);
    let rebuilt_for = file.map(|file| {
        quote!(
            const _: &[u8] = include_bytes!(#file);
        )
    });
    let doc = format!("The model that `{}` declares.", spec.name);
    quote! {
        #rebuilt_for

        #[doc = #doc]
        pub struct SpecModel;

        #krate::tile_products! {
            pub struct AttentionProducts; element = #element, key_rows = #key_rows, head_dim = #head_dim
        }
        #krate::tile_products! {
            pub struct ProfileProducts;
            element = #element, key_rows = #PROFILE_KEY_ROWS, head_dim = #head_dim, columns = #PROFILE_COLUMNS
        }

        impl #krate::model::Model for SpecModel {
            const LAYOUT: #krate::shapes::layout::Layout = #krate::shapes::layout::Layout {
                frames: #frames,
                tokens_per_frame: #tokens_per_frame,
                text_tokens: #text_tokens,
                text_position: #krate::shapes::layout::TextPosition::#text_position,
                sink_frames: #sink_frames,
                spatial_half_width: #spatial,
                temporal_half_width: #temporal,
            };
            const HEADS: u32 = #heads;
            const HEAD_DIM: u32 = #head_dim;
            const QK_NORM: Option<#norm_rope::QkNorm> = #qk_norm;
            const ROPE: Option<#norm_rope::Rope> = #rope;
            const PROFILE_ROWS: u32 = #rows;
            const TILES: #krate::shapes::blocks::Tiles =
                #krate::shapes::blocks::Tiles { query_rows: #query_rows, key_rows: #key_rows, stages: #stages };
            type Element = #krate::element::#element;
            type Attention = AttentionProducts;
            type Profile = ProfileProducts;
        }

        /// Norm, RoPE and reordering into packed images.
        #[#krate::kernel(threads = #pack_threads, min_blocks = #pack_blocks, shared_bytes = #pack_shared)]
        pub unsafe fn pack(params: #krate::shapes::params::PackParams) {
            unsafe { #krate::pack::pack::<SpecModel>(&params) }
        }

        /// Attention of sampled rows under every mask.
        #[#krate::kernel(threads = #PROFILE_THREADS, shared_bytes = #profile_shared)]
        pub unsafe fn profile(params: #krate::shapes::params::ProfileParams) {
            unsafe { #krate::profile::profile::<SpecModel>(&params) }
        }

        /// The choice of each head's mask.
        #[#krate::kernel(threads = #SELECT_THREADS, shared_bytes = #select_shared)]
        pub unsafe fn select(params: #krate::shapes::params::SelectParams) {
            unsafe { #krate::select::select::<SpecModel>(&params) }
        }

        /// Sparse attention.
        #[#krate::kernel(threads = #attention_threads, shared_bytes = #attention_shared)]
        pub unsafe fn attention(params: #krate::shapes::params::AttentionParams) {
            unsafe { #krate::attention::#family::attention::<SpecModel>(&params) }
        }
    }
}
