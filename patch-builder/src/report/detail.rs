//! What only the page shows: instructions side by side, and who calls what.

/// The detail of a report.
#[derive(Clone, Debug, Default)]
pub struct Detail {
    /// The code of functions of the report, by their index there.
    pub listings: Vec<Listing>,
    /// Who reaches what changed.
    pub graph: Graph,
}

/// Both versions of one function, aligned.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Its index among the report's functions.
    pub function: usize,
    /// Its instructions.
    pub rows: Vec<Row>,
}

/// How the two sides of a row compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// The same.
    Equal,
    /// Both are there, and differ.
    Changed,
    /// Only in the old version.
    Removed,
    /// Only in the new version.
    Added,
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// How the sides compare.
    pub kind: RowKind,
    /// The old side.
    pub old: Option<Cell>,
    /// The new side.
    pub new: Option<Cell>,
    /// The source line that begins here: `file:line`, and its text if that is at hand.
    pub source: Option<(String, Option<String>)>,
}

/// One instruction.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Its offset in the function.
    pub at: u32,
    /// Its text.
    pub text: String,
}

/// What a node of the call graph is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// In the patch, with an old version.
    Changed,
    /// New with the patch.
    New,
    /// Reaches one of them.
    Caller,
    /// Where the program starts.
    Main,
    /// Where a thread starts.
    Thread,
}

/// A function in the call graph.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
    /// How many calls it is away from what changed.
    pub layer: usize,
    /// How many more functions call it that are not shown.
    pub more: usize,
    /// Whether its address is stored, exported or handed over, so that callers may not be seen.
    pub pointed: bool,
}

/// Who reaches what changed.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// The functions.
    pub nodes: Vec<Node>,
    /// Calls: caller and callee, as indices of nodes.
    pub edges: Vec<(usize, usize)>,
    /// How many functions of the patch are not shown.
    pub left_out: usize,
}
