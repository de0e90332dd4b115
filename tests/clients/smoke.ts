// What tests/cluster/test_generated_clients.py runs with the client that openapi-generator makes for typescript-fetch.
import {
    AcquireLock409FromJSON,
    AgentsApi,
    BeadsApi,
    Configuration,
    EventsApi,
    LocksApi,
    ProjectsApi,
    ProvidersApi,
    ResponseError,
} from "./index";

declare const process: { env: Record<string, string | undefined>; exit(status: number): never };

function check(condition: boolean, what: string): void {
    if (!condition) throw new Error(what);
}

async function main(): Promise<void> {
    const configuration = new Configuration({ basePath: process.env.LOOM_URL });
    const locks = new LocksApi(configuration);
    const beads = new BeadsApi(configuration);

    const provider = await new ProvidersApi(configuration).createProvider({
        createProvider: { id: "local", name: "Local", attributes: { region: "eu" } },
    });
    check(provider.attributes!["region"] === "eu", "attributes");

    const name = "deploy/ü (1)";
    const grant = await locks.acquireLock({ name, acquireLock: { owner: "a", metadata: { why: [1] } } });
    check(grant.fencingToken > 2 ** 32, "token");
    try {
        await locks.acquireLock({ name, acquireLock: { owner: "b" } });
        throw new Error("two holders");
    } catch (error) {
        if (!(error instanceof ResponseError)) throw error;
        const problem = AcquireLock409FromJSON(await error.response.json());
        check(problem.type === "/problems/lock-held" && problem.holder?.owner === "a", "holder");
    }
    await locks.renewLock({ name, renewLock: { fencingToken: grant.fencingToken } });
    await locks.releaseLock({ name, fencingToken: grant.fencingToken });

    await new ProjectsApi(configuration).createProject({
        createProject: { id: "p", name: "p", gitRepo: "r", branch: "main" },
    });
    await new AgentsApi(configuration).createAgent({
        createAgent: { id: "a", personaName: "coder", projectId: "p" },
    });
    await beads.createBead({ createBead: { id: "x", title: "x", projectId: "p", context: { branch: "fix" } } });
    const claim = await beads.claimNextBead({ claimNext: { agentId: "a" } });
    console.log("claimed", claim!.bead.id);
    const bead = await beads.completeBead({ id: "x", complete: { fencingToken: claim!.fencingToken } });
    check(bead.status === "closed" && bead.context!["branch"] === "fix", "bead");

    const page = await new EventsApi(configuration).readEvents({ after: 0 });
    check(page.events.at(-1)!.type === "bead.completed", "events");
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
