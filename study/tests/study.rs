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

/// The study with 8 bits in layer 1, whose relative errors are these: at both densities, and dense.
fn with_8_bits(relative: [f64; 3]) -> Study {
    let mut study = study().allowing(0.02).unwrap();
    let Some(Some(layer)) = study.steps[1].layers.get_mut(1) else { panic!() };
    // The sizes are 6 together.
    layer.eight_bits = Some(relative.map(|error| vec![Some(2.0 * error * error); 3]).to_vec());
    study
}

#[test]
fn eight_bits_are_chosen_where_they_take_less_time() {
    let needs = |relative| {
        let step = with_8_bits(relative).schedule().steps.remove(1);
        (step.density[1].unwrap(), step.compute.unwrap()[1].unwrap())
    };
    // In 16 bits the layer needs 0.4, where its error is 0.0123.
    assert_eq!(needs([0.015, 0.014, 0.013]), (0.2, "e4m3"));
    assert_eq!(needs([0.03, 0.014, 0.013]), (0.4, "e4m3"));
    assert_eq!(needs([0.03, 0.03, 0.013]), (0.4, "dtype"));
    assert_eq!(needs([0.015, 0.03, 0.013]), (0.4, "dtype"));
    assert_eq!(needs([0.015, 0.014, 0.03]), (0.4, "dtype"));
    // Where no density suffices, dense attention has 8 bits of its own.
    let mut study = with_8_bits([0.03, 0.009, 0.009]).allowing(0.01).unwrap();
    assert_eq!(study.schedule().steps[1].density[1], Some(0.4));
    let Some(Some(layer)) = study.steps[1].layers.get_mut(1) else { panic!() };
    let Some(errors) = &mut layer.eight_bits else { panic!() };
    errors[1][0] = None;
    let step = study.schedule().steps.remove(1);
    assert_eq!((step.density[1], step.compute.unwrap()), (Some(1.0), vec![None, Some("e4m3"), Some("dtype")]));
}

#[test]
fn eight_bits_are_shown_and_kept() {
    let study = with_8_bits([0.03, 0.014, 0.013]);
    assert_eq!(Study::parse("file", &study.to_json()).unwrap(), study);
    let line_of = |table: &str, start: &[&str]| line(table, start)[3..].join(" ");
    let table = by_layer(&study);
    let layer = "0.0245 0.0123 | 0.0300 0.0140 0.0130 0.4 e4m3 2 1 2 (0.0300)";
    assert_eq!(line_of(&table, &["4", "0.500", "1"]), layer);
    assert_eq!(line_of(&table, &["0", "1.000", "0"]), "0.2452 0.1226 | - - - dense 2 1 2 (0.3000)");
    let head = line_of(&by_head(&study), &["4", "0.500", "1", "1"]);
    assert!(head.ends_with("| 0.0010 0.0005 | 0.0212 0.0099 0.0092"), "{head}");
    let schedule = study.schedule().to_json();
    assert!(schedule.contains("\"density\":[null,0.4,1.0],\"compute\":[null,\"e4m3\",\"dtype\"]}\n"), "{schedule}");
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
        layer_of(&mut study).size[2] = None;
        assert_eq!(study.schedule().steps[0].density[0], Some(1.0));
        assert!(by_layer(&study).contains(" dense "));
        assert!(!picture(&study).png().unwrap().is_empty());
    }
}

fn layer_of(study: &mut Study) -> &mut Layer {
    study.steps[0].layers[0].as_mut().unwrap()
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
        *layer_of(&mut study) = layer(factor);
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
