//! Tables, schedules and files of studies whose numbers are known.

use framestride_study::{Layer, Model, Step, Study, by_head, by_layer, picture};

/// A layer of a spatial head, a temporal one, and one that neither mask suits. Errors shrink as the
/// density grows, and are `factor` times as large.
fn layer(factor: f64) -> Layer {
    let errors = [1.0, 0.25].map(|of_density| {
        [[0.0004, 0.04], [0.09, 0.0004], [0.36, 0.49]]
            .map(|errors| errors.map(|error| Some(error * of_density * factor)))
            .to_vec()
    });
    Layer { size: vec![Some(1.0), Some(4.0), Some(1.0)], errors: errors.to_vec(), eight_bits: None }
}

fn study() -> Study {
    let step = |index, noise, layers: Vec<Option<Layer>>| Step { index, count: 10, noise, layers };
    Study {
        version: 1,
        models: vec![Model { name: "high".into(), layers: 1 }, Model { name: "low".into(), layers: 2 }],
        video: [4, 5, 6],
        sampled_rows: 64,
        densities: vec![0.2, 0.4],
        error: 0.05,
        steps: vec![
            step(0, Some(1.0), vec![Some(layer(1.0)), None, None]),
            step(4, Some(0.5), vec![None, Some(layer(0.01)), Some(layer(0.04))]),
        ],
    }
}

#[test]
fn a_layer_has_the_least_density_within_the_error() {
    // The squares of the better masks are 0.0004 + 0.0004 + 0.36, of 6.
    let relative = (0.3608f64 / 6.0).sqrt();
    assert!((0.245..0.246).contains(&relative));
    let densities = |error: f64| -> Vec<Vec<Option<f64>>> {
        study().allowing(error).unwrap().schedule().steps.into_iter().map(|step| step.density).collect()
    };
    // Layers 1 and 2 have a tenth and a fifth of layer 0's error.
    assert_eq!(densities(0.05), [vec![Some(1.0), None, None], vec![None, Some(0.2), Some(0.2)]]);
    assert_eq!(densities(0.03), [vec![Some(1.0), None, None], vec![None, Some(0.2), Some(0.4)]]);
    assert_eq!(densities(0.13), [vec![Some(0.4), None, None], vec![None, Some(0.2), Some(0.2)]]);
    assert_eq!(densities(0.01), [vec![Some(1.0), None, None], vec![None, Some(1.0), Some(1.0)]]);
    assert_eq!(densities(relative + 1e-9)[0][0], Some(0.2));
    assert_eq!(densities(relative - 1e-9)[0][0], Some(0.4));
}

/// The study with 8 bits in layer 1, whose heads have these mean squared errors: at both densities,
/// and dense. Their sizes are 1, 4 and 1.
fn with_8_bits(errors: [[f64; 3]; 3]) -> Study {
    let mut study = study().allowing(0.02).unwrap();
    let Some(Some(layer)) = study.steps[1].layers.get_mut(1) else { panic!() };
    layer.eight_bits = Some(errors.map(|errors| errors.map(Some).to_vec()).to_vec());
    study
}

/// Mean squared errors of three heads that make the relative error of the layer.
fn alike(relative: f64) -> [f64; 3] {
    [2.0 * relative * relative; 3]
}

#[test]
fn eight_bits_are_chosen_where_they_take_less_time() {
    let needs = |study: &Study| {
        let step = study.schedule().steps.remove(1);
        let heads = step.heads_in_16_bits.map_or(Vec::new(), |heads| heads[1].clone().unwrap());
        (step.density[1].unwrap(), step.compute.unwrap()[1].unwrap(), heads)
    };
    // In 16 bits the layer needs 0.4, where its error is 0.0123. At 0.2 it is 0.0245, nearly all of
    // it head 2's.
    assert_eq!(needs(&with_8_bits([alike(0.015), alike(0.014), alike(0.013)])), (0.2, "e4m3", vec![]));
    let rounded = [0.0, 0.0, 0.0036].map(|mask| mask + 0.00001);
    assert_eq!(needs(&with_8_bits([rounded, alike(0.014), alike(0.013)])), (0.4, "e4m3", vec![]));
    // Head 1 alone exceeds it, and stays in 16 bits.
    let [most, other] = [[0.00001, 0.04, 0.0009], [0.00001, 0.04, 0.00001]];
    assert_eq!(needs(&with_8_bits([rounded, most, other])), (0.4, "e4m3", vec![1]));
    // Two of three are the fewest. Three are the layer in 16 bits.
    assert_eq!(needs(&with_8_bits([rounded, [0.003, 0.04, 0.0012], other])), (0.4, "e4m3", vec![0, 1]));
    assert_eq!(needs(&with_8_bits([[0.1; 3]; 3])), (0.4, "dtype", vec![]));
    // A density counts if all larger ones suffice, and heads in 16 bits always do where dense.
    let mut study = with_8_bits([alike(0.015), [0.1; 3], alike(0.013)]);
    layer_of_step(&mut study, 1, 1).errors[1] = vec![[Some(0.1); 2]; 3];
    assert_eq!(needs(&study), (1.0, "e4m3", vec![]));
    // Where an error is not known, the head stays in 16 bits.
    let mut study = with_8_bits([alike(0.015), alike(0.014), alike(0.013)]);
    layer_of_step(&mut study, 1, 1).eight_bits.as_mut().unwrap()[0][1] = None;
    assert_eq!(needs(&study), (0.2, "e4m3", vec![1]));
}

#[test]
fn eight_bits_are_shown_and_kept() {
    let study = with_8_bits([[0.0, 0.0, 0.0036], [0.00001, 0.04, 0.0009], [0.00001, 0.04, 0.00001]]);
    assert_eq!(Study::parse("file", &study.to_json()).unwrap(), study);
    let line_of = |table: &str, start: &[&str]| line(table, start)[3..].join(" ");
    let table = by_layer(&study);
    let layer = "0.0245 0.0123 | 0.0245 0.0826 0.0817 0.4 e4m3 1 of 3 2 1 2 (0.0300)";
    assert_eq!(line_of(&table, &["4", "0.500", "1"]), layer);
    assert_eq!(line_of(&table, &["0", "1.000", "0"]), "0.2452 0.1226 | - - - dense 3 of 3 2 1 2 (0.3000)");
    let heads = by_head(&study);
    let head = |number: &str| line_of(&heads, &["4", "0.500", "1", number]);
    assert!(head("1").ends_with("| 0.0010 0.0005 | 0e0 0.1000 0.1000 | 16 bits"), "{}", head("1"));
    assert!(head("2").ends_with("| 8 bits"), "{}", head("2"));
    let schedule = study.schedule().to_json();
    let step = "\"density\":[null,0.4,1.0],\"compute\":[null,\"e4m3\",\"dtype\"],\"heads_in_16_bits\":[null,[1],[]]}\n";
    assert!(schedule.contains(step), "{schedule}");
    assert!(!schedule.contains("\"compute\":[\"dtype\",null,null],\"heads"), "{schedule}");
    // Head 1 stays in 16 bits in all steps that called the layer, as do the heads of other layers.
    let image = image::load_from_memory(&picture(&study).png().unwrap()).unwrap().to_rgb8();
    assert!(image.pixels().filter(|pixel| pixel.0 == [120, 20, 90]).count() > 7 * 200);
}

fn layer_of_step(study: &mut Study, step: usize, layer: usize) -> &mut Layer {
    study.steps[step].layers[layer].as_mut().unwrap()
}

/// Sampled errors may rise by chance. A density counts if no larger one is worse than allowed.
#[test]
fn a_density_counts_with_all_above_it() {
    let mut study = study();
    let Some(Some(layer)) = study.steps[0].layers.first_mut() else { panic!() };
    layer.errors[0] = vec![[Some(0.0); 2]; 3];
    assert_eq!(study.schedule().steps[0].density[0], Some(1.0));
}

#[test]
fn what_is_not_known_is_never_within_the_error() {
    for change in
        [|layer: &mut Layer| layer.errors[0] = vec![[None; 2]; 3], |layer: &mut Layer| layer.errors[0][1] = [None; 2]]
    {
        let mut study = study().allowing(0.9).unwrap();
        assert_eq!(study.schedule().steps[0].density[0], Some(0.2));
        let Some(Some(layer)) = study.steps[0].layers.first_mut() else { panic!() };
        change(layer);
        assert_eq!(study.schedule().steps[0].density[0], Some(0.4));
        assert!(!by_head(&study).contains("varies"));
        layer_of_step(&mut study, 0, 0).size[2] = None;
        assert_eq!(study.schedule().steps[0].density[0], Some(1.0));
        assert!(by_layer(&study).contains(" dense "));
        assert!(!picture(&study).png().unwrap().is_empty());
    }
}

/// The words of the line of a table that begins with `start`.
fn line<'a>(table: &'a str, start: &[&str]) -> Vec<&'a str> {
    let words = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.into_iter().find(|words| words.starts_with(start)).unwrap_or_else(|| panic!("{start:?} in {table}"))
}

#[test]
fn tables_say_which_mask_and_how_large_its_error() {
    let table = by_layer(&study().allowing(0.13).unwrap());
    assert_eq!(
        line(&table, &["0", "1.000"]),
        ["0", "1.000", "0", "0.2452", "0.1226", "0.4", "2", "1", "2", "(0.3000)"]
    );
    assert_eq!(line(&table, &["4", "0.500", "1"])[3..6], ["0.0245", "0.0123", "0.2"]);
    let table = by_head(&study());
    let head = |head: &str| line(&table, &["0", "1.000", "0", head])[4..].to_vec();
    assert_eq!(head("0"), ["spatial", "|", "0.0200", "0.0100", "|", "0.2000", "0.1000"]);
    assert_eq!(head("1"), ["temporal", "|", "0.1500", "0.0750", "|", "0.0100", "0.0050"]);
    assert_eq!(head("2"), ["spatial", "|", "0.6000", "0.3000", "|", "0.7000", "0.3500"]);
    assert_eq!(table.lines().count(), 4 + 9);
}

#[test]
fn a_study_comes_back_from_its_file() {
    let study = study();
    assert_eq!(Study::parse("file", &study.to_json()).unwrap(), study);
    assert_eq!(study.to_json().lines().count(), 12);
    let schedule = study.schedule().to_json();
    assert!(schedule.starts_with("{\n  \"framestride_schedule\": 1,\n"), "{schedule}");
    let step = "    {\"index\":4,\"count\":10,\"noise\":0.5,\"density\":[null,0.2,0.2]}\n";
    assert!(schedule.contains(step), "{schedule}");
}

#[test]
fn a_file_that_is_none_is_refused() {
    let right = study().to_json();
    for (from, to, words) in [
        ("framestride_study\": 1", "framestride_study\": 2", "version 2"),
        ("framestride_study", "framestride_schedule", "no key framestride_study"),
        ("{", "[", "no JSON"),
        ("\"video\"", "\"film\"", "film"),
        ("[0.2,0.4]", "[0.4,0.2]", "each larger"),
        ("[0.2,0.4]", "[0.2,1.4]", "density 1.4"),
        ("[0.2,0.4]", "[]", "one or more"),
        ("0.05", "5", "below 1"),
        ("\"layers\":1}", "\"layers\":2}", "3 layers in step 0"),
        ("\"index\":4", "\"index\":10", "step 10 of 10"),
        ("\"size\":[1.0,4.0,1.0]", "\"size\":[1.0,4.0]", "layer 0 of step 0"),
        ("\"size\":[1.0,4.0,1.0]", "\"size\":[1.0,-4.0,1.0]", "-4 in layer 0 of step 0"),
        ("\"size\"", "\"eight_bits\":[[1.0,1.0,1.0]],\"size\"", "in 8 bits"),
        ("\"size\"", "\"eight_bits\":[[1.0],[1.0],[1.0]],\"size\"", "in 8 bits"),
    ] {
        let wrong = right.replacen(from, to, 1);
        assert_ne!(wrong, right, "{from}");
        let error = Study::parse("study.json", &wrong).unwrap_err().to_string();
        assert!(error.starts_with("study.json: found ") && error.contains(words), "{words}: {error}");
        assert!(error.contains("allowed: ") && error.contains("mend: "), "{error}");
    }
    for error in [0.0, 1.0, -0.1, f64::NAN] {
        assert!(study().allowing(error).unwrap_err().to_string().starts_with("error: found"));
    }
}

/// Whatever the numbers are, a picture can be drawn.
#[test]
fn pictures_of_extremes() {
    for (factor, error) in [(1e200, 0.9), (1e-200, 1e-200), (0.0, 0.5), (f64::MAX, 1e-9)] {
        let mut study = study().allowing(error).unwrap();
        *layer_of_step(&mut study, 0, 0) = layer(factor);
        assert!(!picture(&study).png().unwrap().is_empty());
        assert!(by_layer(&study).lines().count() > 5 && by_head(&study).lines().count() > 5);
    }
}

/// Each cell of the picture has the colour of the better mask, and is darker the larger its error.
#[test]
fn the_picture_shows_the_better_mask() {
    let png = picture(&study()).png().unwrap();
    let image = image::load_from_memory(&png).unwrap().to_rgb8();
    let count = |colour: [u8; 3]| image.pixels().filter(|pixel| pixel.0 == colour).count();
    // Relative error 0.01 of the temporal head and lower ones have the lightest colour.
    let (light_spatial, light_temporal) = (count([206, 239, 234]), count([253, 236, 200]));
    assert!(light_spatial > 200 && light_temporal > 200, "{light_spatial} {light_temporal}");
    // FRAMESTRIDE_PICTURE=FILE keeps it, to be looked at.
    if let Some(file) = std::env::var_os("FRAMESTRIDE_PICTURE") {
        std::fs::write(file, png).unwrap();
    }
}
