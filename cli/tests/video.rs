//! Inputs made from a video are of the kinds that trained heads are.

use framestride::Spec;
use framestride_check::reference::Reference;
use framestride_cli::tensor_files::load_frames;
use framestride_cli::video;

/// Of the heads made from Big Buck Bunny, even ones are spatial and odd ones temporal, each by a
/// clear margin.
#[test]
fn video_makes_heads_of_both_types() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/data/bigbuckbunny_16x72x128.safetensors");
    let spec = Spec::shipped("demo").unwrap();
    let inputs = video::inputs(&spec, spec.heads as usize, &load_frames(path.as_ref()).unwrap(), path).unwrap();
    inputs.check(&spec, "video").unwrap();
    let reference = Reference::new(&spec, &inputs);
    for head in 0..spec.heads {
        let rows = reference.head(0, head as usize);
        let [spatial, temporal] = rows.profile(&spec.layout, inputs.scale(), 0, head, 64).errors;
        println!("head {head}: {spatial:.3e} {temporal:.3e}");
        if head % 2 == 0 {
            assert!(spatial < 0.5 * temporal, "head {head}: {spatial} {temporal}");
        } else {
            assert!(temporal < 0.5 * spatial, "head {head}: {spatial} {temporal}");
        }
    }
}
