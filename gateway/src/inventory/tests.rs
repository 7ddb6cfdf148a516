use super::{
    counts::Seen,
    tree::{NODES, ROWS, method_number},
    *,
};

fn seen(status: u16) -> Seen {
    Seen { status, aborted: false, micros: Some(2_000), at: 1_800_000_000 }
}

fn ask(inventory: &mut Inventory, method: &str, path: &str, status: u16) {
    let method = method_number(&method.parse().unwrap());
    inventory.take(path.trim_start_matches('/'), Request { method, route: 0, arm: Arm::Legacy, seen: seen(status) });
}

fn told(inventory: &Inventory) -> Vec<String> {
    let locate =
        |_: &str, _: &[Step], _: Option<&str>| Place { route: None, standing: Standing::Legacy, tags: Vec::new() };
    let document = inventory.document(1_800_000_000, &locate);
    document.endpoints.iter().map(|endpoint| format!("{} {}", endpoint.method, endpoint.path)).collect()
}

#[test]
fn what_varies_is_left_open_and_what_is_named_is_not() {
    let mut inventory = Inventory::new(1_800_000_000);
    for n in 0..300_usize {
        ask(&mut inventory, "GET", &format!("/api/orders/{n}"), 200);
        ask(&mut inventory, "GET", &format!("/api/orders/{n}/items"), 200);
        ask(&mut inventory, "GET", "/api/orders/export", 200);
        ask(&mut inventory, "DELETE", &format!("/api/users/{n:08x}-8b86-d011-b42d-00cf4fc964ff"), 204);
        ask(
            &mut inventory,
            "GET",
            &format!("/shop/the-{}-shirt", ["blue", "red", "old"][n % 3].repeat(n % 40 + 1)),
            200,
        );
        ask(&mut inventory, "GET", ["/login.php", "/cart.php"][n % 2], 200);
        // What is not there is no endpoint.
        ask(&mut inventory, "GET", &format!("/wp-admin-{n}.php"), 404);
    }
    let mut told = told(&inventory);
    told.sort();
    let expected = [
        "DELETE /api/users/{id}",
        "GET /api/orders/export",
        "GET /api/orders/{id}",
        "GET /api/orders/{id}/items",
        "GET /cart.php",
        "GET /login.php",
    ];
    for endpoint in expected {
        assert!(told.contains(&endpoint.to_owned()), "{endpoint} in {told:#?}");
    }
    assert!(told.contains(&"GET /shop/{id}".to_owned()) || told.contains(&"GET /shop/{slug}".to_owned()), "{told:#?}");
    assert!(told.iter().all(|endpoint| !endpoint.contains("wp-admin")), "{told:#?}");
    // A few are asked for so often that they have names of their own; not many.
    assert!(told.len() < 60, "{told:#?}");
}

/// A million paths, each asked for once and answered 200, of every shape: the worst that a monolith can do to us.
#[test]
fn hostile_paths_find_no_room_and_real_endpoints_keep_theirs() {
    let mut inventory = Inventory::new(1_800_000_000);
    let real: Vec<String> = ["orders", "users", "api/carts", "reports"]
        .iter()
        .flat_map(|part| ('a'..='j').map(move |letter| format!("/{part}/action{letter}")))
        .collect();
    let mut random = 7_u64;
    let mut next = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        random >> 16
    };
    let letters = |n: u64| -> String { (0..8).map(|at| char::from(b'a' + ((n >> (at * 5)) % 26) as u8)).collect() };
    for n in 0..1_000_000_u64 {
        let (a, b, c) = (next(), next(), next());
        let path = match n % 8 {
            0 => format!("/{a:x}"),
            1 => format!("/{}", letters(a)),
            2 => format!("/{}/{}/{}", letters(a), letters(b), letters(c)),
            3 => format!("/orders/{}-{}", letters(a), letters(b)),
            4 => format!("/{}", (0..20).map(|_| letters(a) + "/").collect::<String>()),
            5 => format!("/{}.php", letters(a)),
            6 => format!("/users/%7B{}%7D\u{1b}[2J\u{202e}/{{x}}", letters(a)),
            _ => format!("/{}/{}", letters(a % 300), letters(b)),
        };
        ask(&mut inventory, "GET", &path, 200);
        // Real ones come all the time, one in ten requests.
        if n % 9 == 0 {
            ask(&mut inventory, "GET", &real[(n / 9) as usize % real.len()], 200);
        }
        let (nodes, rows) = inventory.tree.size();
        assert!(nodes <= NODES && rows <= ROWS, "{nodes} nodes, {rows} rows");
    }
    let told = told(&inventory);
    let listed = real.iter().filter(|path| told.contains(&format!("GET {path}"))).count();
    assert_eq!(listed, real.len(), "of {:?}\n{:#?}", real, &told[..50.min(told.len())]);
    // What is counted of size is what there is.
    let mut rows = 0;
    inventory.tree.each(|_, _| rows += 1);
    assert_eq!(rows, inventory.tree.size().1);
    // No template can be mistaken for another, or does something to a terminal.
    assert!(told.iter().all(|line| line.is_ascii() && !line.contains('\u{1b}')), "{told:?}");
}

/// A flood before anybody real has come: they are found all the same.
#[test]
fn real_endpoints_are_found_after_a_flood() {
    let mut inventory = Inventory::new(1_800_000_000);
    for n in 0..100_000_u64 {
        let letters: String = (0..8).map(|at| char::from(b'a' + (((n * 7_919) >> (at * 3)) % 26) as u8)).collect();
        ask(&mut inventory, "GET", &format!("/{letters}"), 200);
        ask(&mut inventory, "GET", &format!("/x-{n}-{letters}/{letters}"), 200);
    }
    for n in 0..20_000_usize {
        ask(&mut inventory, "GET", ["/login", "/orders", "/orders/17"][n % 3], 200);
    }
    let told = told(&inventory);
    for path in ["GET /login", "GET /orders", "GET /orders/{id}"] {
        assert!(told.contains(&path.to_owned()), "{path}: {} in all", told.len());
    }
}

#[test]
fn patterns_and_documents_say_what_is_a_name_and_what_is_not() {
    let mut inventory = Inventory::new(1_800_000_000);
    inventory.pin(&steps("/products/{slug}/**", false));
    let document = import::document(
        r#"{"openapi": "3.0.0", "paths": {"/reports/{year}": {"get": {}}, "/reports/all": {"get": {}, "post": {}}}}"#,
    );
    inventory.merge(&document.unwrap(), false, 1_800_000_000).unwrap();
    ask(&mut inventory, "GET", "/products/shirt", 200);
    ask(&mut inventory, "GET", "/products/hat/reviews", 200);
    ask(&mut inventory, "GET", "/reports/all", 200);
    ask(&mut inventory, "GET", "/reports/latest", 200);
    let mut told = told(&inventory);
    told.sort();
    assert_eq!(
        told,
        [
            "GET /products/{slug}",
            "GET /products/{slug}/reviews",
            "GET /reports/all",
            "GET /reports/{year}",
            "POST /reports/all",
        ]
    );
    let locate = |_: &str, _: &[Step], _: Option<&str>| Place { route: None, standing: Standing::Legacy, tags: vec![] };
    let document = inventory.document(1_800_000_000, &locate);
    assert_eq!((document.summary.never_called, document.summary.endpoints), (1, 4));
    // What is kept is there again, and a second reading of a template is the first one.
    let text = serde_json::to_string(&document).unwrap();
    let mut again = Inventory::new(1_800_000_500);
    again.merge(&import::document(&text).unwrap(), false, 1_800_000_000).unwrap();
    let same = again.document(1_800_000_000, &locate);
    assert_eq!(serde_json::to_value(&same).unwrap(), serde_json::to_value(&document).unwrap());
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_template_reads_as_itself(paths in proptest::collection::vec("[ -~é%{}]{0,12}(/[ -~é%{}]{0,12}){0,4}", 1..60)) {
            let mut inventory = Inventory::new(1_800_000_000);
            for path in &paths {
                ask(&mut inventory, "GET", path, 200);
            }
            inventory.tree.each(|known, _| {
                let text = template(known);
                assert_eq!(template(&steps(&text, false)), text, "{known:?}");
            });
        }
    }
}
