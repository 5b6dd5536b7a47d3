//! The pages of the repository lead somewhere: files move, and links must follow.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::checkout;

#[test]
fn every_link_to_a_file_leads_there() {
    let mut pages = Vec::new();
    find_pages(&checkout(""), &mut pages);
    let mut wrong = Vec::new();
    let mut links = 0;
    for page in pages {
        let text = fs::read_to_string(&page).unwrap_or_else(|error| panic!("{}: {error}", page.display()));
        for target in targets(&text) {
            links += 1;
            if !page.with_file_name(target).exists() {
                wrong.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "links to files that are not there:\n{}", wrong.join("\n"));
    assert!(links > 100, "only {links} links were found");
}

/// Adds the Markdown files below a folder, without those of builds and of hidden folders.
fn find_pages(folder: &Path, pages: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.extension().is_some_and(|end| end == "md") {
            pages.push(path);
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) && name != "target" && !is_hidden(&name) {
            find_pages(&path, pages);
        }
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// The relative paths that a page links to, without the place in a page.
fn targets(text: &str) -> impl Iterator<Item = &str> {
    let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    let paths = links.map(|(target, _)| target.split('#').next().unwrap_or_default());
    paths.filter(|path| !path.is_empty() && !path.contains("://"))
}
