from __future__ import annotations

from kedro.framework.project import configure_project

from sce_pipeline.pipeline_registry import register_pipelines


def test_no_node_takes_more_than_five_inputs():
    configure_project("sce_pipeline")
    nodes = {node for pipeline in register_pipelines().values() for node in pipeline.nodes}
    assert len(nodes) > 30
    assert not {node.name: node.inputs for node in nodes if len(node.inputs) > 5}
