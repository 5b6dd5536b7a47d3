//! The header that is checked in is the one that the crate makes.

use std::path::Path;

/// `INSTA_UPDATE=always cargo test -p framestride-capi --test header` writes it again.
#[test]
fn the_header_is_up_to_date() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(crate_folder.join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    cbindgen::Builder::new().with_crate(crate_folder).with_config(config).generate().unwrap().write(&mut made);
    let path = crate_folder.join("include/framestride.h");
    if std::env::var_os("INSTA_UPDATE").is_some_and(|update| update == "always") {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read(&path).unwrap_or_default();
    let update = "it differs: INSTA_UPDATE=always cargo test -p framestride-capi --test header";
    assert!(kept == made, "{}: {update}", path.display());
}
