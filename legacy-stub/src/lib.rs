//! A believable monolith: a shop with users, products, orders, payments and notifications.
//!
//! It has what makes a real one hard to replace: a login cookie with its own domain,
//! absolute redirects to its own address, HTML beside JSON, server-sent events, a WebSocket.
//! Its data is made from a seed, so that its answers are the same run to run; it can also
//! play one of the services extracted from it, with a defect if told to.

mod answer;
mod live;
mod shop;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

pub use shop::Shop;

/// What part the stub plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// The whole shop.
    Monolith,
    /// The users service.
    Users,
    /// The products service.
    Products,
    /// The orders service.
    Orders,
    /// The payments service.
    Payments,
    /// The notifications service.
    Notifications,
}

impl Part {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Monolith => "monolith",
            Self::Users => "users",
            Self::Products => "products",
            Self::Orders => "orders",
            Self::Payments => "payments",
            Self::Notifications => "notifications",
        }
    }
}

/// What is wrong with an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Defect {
    /// Answers 500.
    Error,
    /// Answers 500 to whoever reads.
    Reads,
    /// Answers 404.
    Missing,
    /// Answers after half a second.
    Slow,
    /// Leaves a field out.
    Field,
    /// Gets a number wrong.
    Number,
}

/// The command line of the stub.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen; port 0 takes a free one. The address is printed on the first line.
    #[arg(long, default_value = "127.0.0.1:9000")]
    pub listen: SocketAddr,
    /// What part to play.
    #[arg(long, value_enum, default_value_t = Part::Monolith)]
    pub play: Part,
    /// A defect of an endpoint, like `orders=number`.
    #[arg(long, value_name = "ENDPOINT=DEFECT", value_parser = parse_defect)]
    pub defect: Vec<(String, Defect)>,
    /// What the data is made from.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Ends with its standard input, so that it never outlives who started it.
    #[arg(long)]
    pub follow_stdin: bool,
}

fn parse_defect(text: &str) -> Result<(String, Defect), String> {
    let (endpoint, defect) = text.split_once('=').ok_or("write it like `orders=number`")?;
    let defect = <Defect as clap::ValueEnum>::from_str(defect, false)?;
    Ok((endpoint.to_owned(), defect))
}

/// A running stub: its shop, its part and its counts.
#[derive(Debug)]
pub struct Stub {
    /// What part it plays.
    pub part: Part,
    /// Its own address, which its redirects name.
    pub address: SocketAddr,
    shop: Mutex<Shop>,
    counts: Mutex<std::collections::BTreeMap<String, u64>>,
    /// As the command line says, until `PUT /_stub/defects` says something else.
    defects: Mutex<Vec<(String, Defect)>>,
}

impl Stub {
    fn shop(&self) -> std::sync::MutexGuard<'_, Shop> {
        self.shop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, what: &str) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what.to_owned()).or_default() += 1;
    }

    fn defect(&self, endpoint: &str) -> Option<Defect> {
        let defects = self.defects.lock().unwrap_or_else(PoisonError::into_inner);
        defects.iter().find(|(name, _)| name == endpoint).map(|(_, defect)| *defect)
    }

    /// Has other defects from now on, like `orders=number,users=slow`; none where the text is empty.
    fn spoil(&self, text: &str) -> Result<(), String> {
        let list = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let defects = list.map(parse_defect).collect::<Result<_, _>>()?;
        *self.defects.lock().unwrap_or_else(PoisonError::into_inner) = defects;
        Ok(())
    }
}

/// Serves on a listener until its task is dropped.
pub async fn serve(listener: TcpListener, options: &Options) -> io::Result<()> {
    let stub = Arc::new(Stub {
        part: options.play,
        address: listener.local_addr()?,
        shop: Mutex::new(Shop::new(options.seed)),
        counts: Mutex::default(),
        defects: Mutex::new(options.defect.clone()),
    });
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            // No descriptor left, say: others may give theirs back.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            continue;
        };
        let _ = tcp.set_nodelay(true);
        let stub = stub.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer::answer(stub.clone(), request));
            // A client that hangs up is no news.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(tcp), service).with_upgrades().await;
        });
    }
}

/// The executable: says its address, then serves.
pub fn main(options: &Options) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(options.listen).await?;
        println!("{} listening on {}", options.play.word(), listener.local_addr()?);
        tokio::select! {
            result = serve(listener, options) => result,
            () = end_of_stdin(), if options.follow_stdin => Ok(()),
        }
    })?;
    runtime.shutdown_background();
    Ok(())
}

async fn end_of_stdin() {
    let _ = tokio::task::spawn_blocking(|| io::copy(&mut io::stdin().lock(), &mut io::sink())).await;
}
